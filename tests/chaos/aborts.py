# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Requests that end early: aborted while queued, in prefill, in decode, or left by their client.

Owns how each phase is reached and how it is told afterwards which phase it was: the moment of an
abort is a race that nobody wins always. What such a request has answered must be right as far as it
goes.
"""

from __future__ import annotations

import itertools
import json
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from sglang_cpu.client import Generation, RequestError
from sglang_cpu.server import SGLangServer

from .events import Event
from .traffic import LONGEST_ANSWER, REQUEST_TIMEOUT_S, Client

CROWD = 5
QUEUE_WAIT_S = 3.0
QUEUED = "waiting queue"


class _Left(Exception):
    """The client has gone away in the middle of an answer."""


class Aborts:
    """Carries out the events of the track `requests`."""

    def __init__(self, client: Client, seed: int) -> None:
        self._client = client
        self._dice = random.Random(f"{seed} aborts")
        self._numbers = itertools.count()

    def carry_out(self, event: Event) -> None:
        """Abort one request, or flush; a server that is down is spared."""
        if event.target not in self._client.world.serving():
            self._client.tally.add(spared_while_down=1)
            return
        server = self._client.world.servers[event.target]
        begin_s = time.monotonic()
        try:
            getattr(self, f"_{event.kind}")(server)
        except RequestError as error:
            what = f"{event.kind} on {event.target}: {error}"
            if not self._client.world.was_down(event.target, begin_s, time.monotonic()):
                self._client.tally.note_failed(what)

    def _flush(self, server: SGLangServer) -> None:
        """Asked for while requests run; SGLang flushes when they have ended."""
        with self._client.spared(server.name):
            server.flush(timeout_s=REQUEST_TIMEOUT_S)
        self._client.tally.add(flushes=1)

    def _abort_decode(self, server: SGLangServer) -> None:
        rid = self._rid()

        def abort_once_it_runs(ids: list[int]) -> None:
            if len(ids) == 2:
                server.abort(rid)

        self._send(server, rid, abort_once_it_runs)

    def _disconnect(self, server: SGLangServer) -> None:
        def leave(ids: list[int]) -> None:
            raise _Left

        self._send(server, self._rid(), leave)

    def _abort_prefill(self, server: SGLangServer) -> None:
        rid = self._rid()
        with ThreadPoolExecutor(1) as pool:
            request = pool.submit(self._send, server, rid)
            time.sleep(self._dice.uniform(0.01, 0.2))
            server.abort(rid)
            request.result()

    def _abort_queued(self, server: SGLangServer) -> None:
        """More requests than may run; the last that came goes."""
        rids = [self._rid() for _ in range(CROWD)]
        with ThreadPoolExecutor(CROWD) as pool:
            requests = [pool.submit(self._send, server, rid) for rid in rids]
            deadline_s = time.monotonic() + QUEUE_WAIT_S
            while not _waiting(server) and time.monotonic() < deadline_s:
                time.sleep(0.01)
            for rid in reversed(rids):
                server.abort(rid)
            for request in requests:
                request.result()

    def _rid(self) -> str:
        return f"chaos-{next(self._numbers)}"

    def _send(
        self, server: SGLangServer, rid: str, on_part: Callable[[list[int]], None] | None = None
    ) -> None:
        """One request that will be aborted; notes in which phase it was."""
        number = self._dice.randrange(len(self._client.prompts.prompts))
        begin_s = time.monotonic()
        try:
            got = server.generate(
                self._client.prompts.prompts[number],
                LONGEST_ANSWER,
                rid=rid,
                timeout_s=REQUEST_TIMEOUT_S,
                on_part=on_part,
            )
        except _Left:
            self._client.tally.add(left_by_their_client=1)
            return
        except RequestError as error:
            if not self._client.world.was_down(server.name, begin_s, time.monotonic()):
                self._client.tally.note_failed(f"{server.name}, to be aborted: {error}")
            return
        self._client.tally.add(**{_phase(got): 1})
        if not self._client.prompts.is_prefix(number, got.output_ids):
            self._client.tally.note_wrong(
                f"{server.name}, prompt {number}, aborted: {got.output_ids} instead of "
                f"{self._client.prompts.answers[number]}"
            )


def _phase(got: Generation) -> str:
    if not got.aborted:
        return "aborts_too_late"
    if QUEUED in str(got.finish_reason.get("message")):
        return "aborted_while_queued"
    return "aborted_in_decode" if len(got.output_ids) > 1 else "aborted_in_prefill"


def _waiting(server: SGLangServer) -> int:
    loads = json.loads(server.get_text("/v1/loads"))["loads"]
    return sum(load["num_waiting_reqs"] for load in loads)
