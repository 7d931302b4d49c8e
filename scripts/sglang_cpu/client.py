# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Talks to one SGLang server over HTTP and times its answers.

Owns requests and their results. Does not own the process (`server`). Standard library only, so that
a measurement carries no other library's overhead and no proxy setting reaches a loopback call.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from typing import Any

_NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_GREEDY = {"temperature": 0, "ignore_eos": True}


class RequestError(RuntimeError):
    """The server refused a request or could not be reached; `status` is 0 in the latter case."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"HTTP {status}: {message}" if status else message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Generation:
    """One answer. `ttft_s` is None where the answer was not streamed."""

    rid: str
    output_ids: list[int]
    text: str
    prompt_tokens: int
    cached_tokens: int
    cached_tokens_details: dict[str, int]
    finish_reason: dict[str, Any]
    ttft_s: float | None
    total_s: float

    @property
    def aborted(self) -> bool:
        return self.finish_reason.get("type") == "abort"


class SGLangClient:
    """The calls that tests, the demo and the benchmarks make on a server."""

    def __init__(self, host: str, port: int) -> None:
        self.host = host
        self.port = port

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def generate(
        self,
        input_ids: Sequence[int] | str,
        max_new_tokens: int = 16,
        *,
        stream: bool = True,
        sampling: Mapping[str, Any] | None = None,
        timeout_s: float = 300.0,
        on_part: Callable[[list[int]], None] | None = None,
        **fields: Any,
    ) -> Generation:
        """Answer one prompt (ids or text), greedily unless `sampling` says otherwise.

        `fields` go into the request as they are (`rid`, `cache_salt`, `lora_path`,
        `bootstrap_room`, ...). `timeout_s` bounds the wait for each next part of the answer.
        `on_part` is called with the ids so far at each part of a streamed answer; what it raises
        ends the request as a client does that goes away.
        """
        prompt_field = "text" if isinstance(input_ids, str) else "input_ids"
        prompt = input_ids if isinstance(input_ids, str) else list(input_ids)
        parameters = {**_GREEDY, "max_new_tokens": max_new_tokens, **(sampling or {})}
        body = {prompt_field: prompt, "sampling_params": parameters, "stream": stream, **fields}
        started = time.perf_counter()
        with closing(self._open("/generate", body, timeout_s)) as response:
            if not stream:
                return _generation(json.load(response), None, started)
            return _last_of_stream(response, started, on_part)

    def generate_many(
        self,
        prompts: Sequence[Sequence[int] | str],
        concurrency: int = 8,
        max_new_tokens: int = 16,
        **options: Any,
    ) -> list[Generation]:
        """Answer every prompt, `concurrency` at a time; results come in the order of the prompts.

        The first failure is raised after the requests already started have ended.
        """

        def answer(prompt: Sequence[int] | str) -> Generation:
            return self.generate(prompt, max_new_tokens, **options)

        with ThreadPoolExecutor(concurrency, thread_name_prefix="generate") as pool:
            return list(pool.map(answer, prompts))

    def flush(self, timeout_s: float = 60.0) -> None:
        """Empty the server's device cache, waiting up to `timeout_s` for requests to end."""
        query = urllib.parse.urlencode({"timeout": timeout_s})
        self._open(f"/flush_cache?{query}", {}, timeout_s + 30).close()

    def abort(self, rid: str) -> None:
        """Ask for the end of one request; no error when it is unknown or already over."""
        self._open("/abort_request", {"rid": rid}, 30).close()

    def abort_all(self) -> None:
        self._open("/abort_request", {"rid": "", "abort_all": True}, 30).close()

    def server_info(self) -> dict[str, Any]:
        """Resolved arguments, version and the scheduler's state."""
        info: dict[str, Any] = json.loads(self.get_text("/server_info"))
        return info

    def post(self, path: str, body: Mapping[str, Any], timeout_s: float = 300.0) -> dict[str, Any]:
        """JSON to a route, JSON back, such as `/v1/completions`."""
        with closing(self._open(path, body, timeout_s)) as response:
            answer: dict[str, Any] = json.load(response)
        return answer

    def get_text(self, path: str, timeout_s: float = 60.0) -> str:
        """Body of a GET, e.g. `/metrics` of a server started with `--enable-metrics`."""
        with closing(self._open(path, None, timeout_s)) as response:
            return response.read().decode()

    def is_healthy(self, timeout_s: float = 30.0) -> bool:
        """True when the server has just answered a one-token request of its own (takes >= 1 s)."""
        try:
            self._open("/health", None, timeout_s).close()
        except RequestError:
            return False
        return True

    def _open(self, path: str, body: Mapping[str, Any] | None, timeout_s: float) -> HTTPResponse:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            response: HTTPResponse = _NO_PROXY.open(request, timeout=timeout_s)
        except urllib.error.HTTPError as error:
            with error:
                raise RequestError(error.code, error.read().decode(errors="replace")) from None
        except (OSError, HTTPException) as error:
            raise RequestError(0, f"no answer from {self.url}{path}: {error}") from error
        return response


def _events(response: HTTPResponse) -> Iterator[dict[str, Any]]:
    try:
        for line in response:
            data = line.strip().removeprefix(b"data:").strip()
            if data == b"[DONE]":
                return
            if data:
                yield json.loads(data)
    except (OSError, HTTPException) as error:
        raise RequestError(0, f"the answer broke off: {error!r}") from error
    raise RequestError(0, "the answer broke off before its end")


def _last_of_stream(
    response: HTTPResponse, started: float, on_part: Callable[[list[int]], None] | None = None
) -> Generation:
    ttft_s: float | None = None
    last: dict[str, Any] = {}
    output_ids: list[int] = []
    for event in _events(response):
        if "error" in event:
            error = event["error"]
            status = error.get("code") if isinstance(error, dict) else None
            raise RequestError(status if isinstance(status, int) else 500, json.dumps(error))
        if ttft_s is None and event.get("output_ids"):
            ttft_s = time.perf_counter() - started
        part, last = event.get("output_ids") or [], event
        # --incremental-streaming-output sends only the new ids, the default sends all so far.
        is_whole = len(part) >= event["meta_info"].get("completion_tokens", 0)
        output_ids = part if is_whole else [*output_ids, *part]
        if on_part is not None:
            on_part(output_ids)
    if not last:
        raise RequestError(0, "the answer was empty")
    return _generation({**last, "output_ids": output_ids}, ttft_s, started)


def _generation(answer: Mapping[str, Any], ttft_s: float | None, started: float) -> Generation:
    meta = answer["meta_info"]
    details = meta.get("cached_tokens_details") or {}
    return Generation(
        rid=meta["id"],
        output_ids=list(answer.get("output_ids") or []),
        text=answer.get("text", ""),
        # Absent where the request was aborted before it ran.
        prompt_tokens=meta.get("prompt_tokens", 0),
        cached_tokens=meta.get("cached_tokens", 0),
        # SGLang adds the backend's name as text beside the counts.
        cached_tokens_details={k: v for k, v in details.items() if isinstance(v, int)},
        finish_reason=meta.get("finish_reason") or {},
        ttft_s=ttft_s,
        total_s=time.perf_counter() - started,
    )
