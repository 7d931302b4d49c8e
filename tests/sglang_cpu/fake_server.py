# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Plays an SGLang server for the harness's tests: same routes, no model, and bad manners on demand.

FAKE_SERVER: `ok`, `die` while starting, never `answer`, or be `deaf` to SIGTERM. It starts a child,
as SGLang does, and prints its pid. An answer's ids are the prompt's first token, counted upwards.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODE = os.environ.get("FAKE_SERVER", "ok")


class Handler(BaseHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Quiet: the log belongs to the test."""

    def do_GET(self) -> None:
        self._send(503 if MODE == "answer" else 200, json.dumps({"version": "fake"}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/generate":
            return self._send(200, json.dumps(body).encode())
        prompt, count = body["input_ids"], body["sampling_params"]["max_new_tokens"]
        if prompt[0] == 400:
            return self._send(400, b'{"error": {"message": "the prompt is too long"}}')
        if not body["stream"]:
            return self._send(200, json.dumps(answer(prompt, count)).encode())
        parts = [json.dumps(answer(prompt, n + 1)) for n in range(count)]
        ending = [] if prompt[0] == 500 else ["[DONE]"]
        stream = "".join(f"data: {part}\n\n" for part in parts + ending)
        return self._send(200, stream.encode())

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def answer(prompt: list[int], count: int) -> dict[str, Any]:
    meta = {
        "id": "r",
        "prompt_tokens": len(prompt),
        "completion_tokens": count,
        "cached_tokens": 3,
        "cached_tokens_details": {"device": 1, "host": 0, "storage": 2, "storage_backend": "x"},
        "finish_reason": {"type": "length", "length": count},
    }
    ids = list(range(prompt[0] + 1, prompt[0] + 1 + count))
    return {"text": "t", "output_ids": ids, "meta_info": meta}


def main() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print(f"child={child.pid}", flush=True)
    if MODE == "die":
        child.kill()
        sys.exit("ValueError: 7 heads cannot be split over 2 ranks")
    if MODE == "deaf":
        signal.signal(signal.SIGTERM, lambda *_: None)
    else:
        # The child stays behind, as a scheduler does when its parent crashes.
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    port = int(sys.argv[sys.argv.index("--port") + 1])
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    main()
