# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""A server that behaves like a model: same prompt, same answer; it remembers what it has seen.

Owns /generate (streamed and not) and /v1/completions. Two that are given one `pool` share it like
servers on a pool. Bad manners are set from the test: `wrong`, `refuse`, `vanish_after`.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PAGE_TOKENS = 16


class FakeModel:
    """One server between `start` and `stop`.

    Attributes:
        texts: the answer to a text prompt that ends in the key; without one there is no number.
        wrong: prompts (their first token) whose answers come out wrong.
        refuse: prompts (first token, or a piece of the text) that are answered with HTTP 500.
        vanish_after: requests after which connections are closed without an answer.
        most_at_once: most requests seen under way at a time.
    """

    def __init__(self, pool: set[tuple[int, ...]] | None = None, delay_s: float = 0.0) -> None:
        self.texts: dict[str, str] = {}
        self.wrong: set[int] = set()
        self.refuse: set[Any] = set()
        self.vanish_after: int | None = None
        self.most_at_once = self.served = 0
        self._pool = set() if pool is None else pool
        self._own: set[tuple[int, ...]] = set()
        self._delay_s = delay_s
        self._under_way = 0
        self._lock = threading.Lock()
        handler = type("BoundHandler", (_Handler,), {"model": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, daemon=True)

    def __enter__(self) -> FakeModel:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def answer(self, body: dict[str, Any]) -> dict[str, Any] | None:
        """The answer to a request; None: close the connection instead."""
        with self._lock:
            self._under_way += 1
            self.served += 1
            self.most_at_once = max(self.most_at_once, self._under_way)
            if self.vanish_after is not None and self.served > self.vanish_after:
                self._under_way -= 1
                return None
        time.sleep(self._delay_s)
        try:
            return self._by_ids(body) if "input_ids" in body else self._by_text(body)
        finally:
            with self._lock:
                self._under_way -= 1

    def _by_text(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt = body.get("text") or body["prompt"]
        asked = prompt.rpartition("Question:")[2]
        if any(piece in asked for piece in self.refuse):
            return {"status": 500}
        text = next((t for key, t in self.texts.items() if key in asked), "I cannot tell.")
        usage = {"prompt_tokens_details": {"cached_tokens": 2}}
        meta = {"id": "r", "prompt_tokens": 4, "completion_tokens": 1, "cached_tokens": 2}
        return {"text": text, "output_ids": [1], "meta_info": meta, "usage": usage} | {
            "choices": [{"text": text}]
        }

    def _by_ids(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt, count = body["input_ids"], body["sampling_params"]["max_new_tokens"]
        if prompt[0] in self.refuse:
            return {"status": 500}
        ids = list(hashlib.sha256(json.dumps(prompt).encode()).digest())[:count]
        if prompt[0] in self.wrong:
            ids[1] += 1
        key, cacheable = tuple(prompt), (len(prompt) - 1) // PAGE_TOKENS * PAGE_TOKENS
        tier = "device" if key in self._own else "storage" if key in self._pool else ""
        self._own.add(key)
        self._pool.add(key)
        details = {"device": 0, "host": 0, "storage": 0}
        if tier:
            details[tier] = cacheable
        meta = {
            "id": "r",
            "prompt_tokens": len(prompt),
            "completion_tokens": count,
            "cached_tokens": sum(details.values()),
            "cached_tokens_details": details,
        }
        return {"text": "t", "output_ids": ids, "meta_info": meta}


class _Handler(BaseHTTPRequestHandler):
    model: FakeModel

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer = self.model.answer(body)
        if answer is None:
            self.close_connection = True
            return
        status = answer.pop("status", 200)
        payload = json.dumps(answer)
        data = f"data: {payload}\n\ndata: [DONE]\n\n" if body.get("stream") else payload
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data.encode())
