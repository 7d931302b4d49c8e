# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""A third-party page store whose faults are switched from outside: another store, disturbed.

Owns the provider side only. It is copied beside an entry point of its own and imported by servers
as an operator's provider would be, so it must not import anything of the tests but what is copied
with it. `faults` switches.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ascend_direct.errors import StoreUnavailable
from ascend_direct.store.base import (
    PageBatch,
    PageStatus,
    PageStore,
    StoreContext,
    StoreStats,
    provider,
)

from .stall_probe import StallProbe

LONGEST_HANG_S = 120.0


def create(options: dict[str, Any]) -> PageStore:
    """Entry point: another store's name and options, and `control`, where faults are read."""
    control = Path(options.pop("control"))
    return FaultyStore(provider(options.pop("store"))(options), control)


class FaultyStore(PageStore):
    """Passes every call on, unless a file named after the operation says otherwise.

    The file holds a mode and its argument:
        `delay S`   the answer comes S seconds late
        `hang`      no answer while the file stands
        `raise`     the whole call fails
        `crash`     an exception that the contract does not allow
        `answer X`  this status (`missing`, `failed`, `unavailable`, `full` …) for every page
        `missing`   the same as `answer missing`
        `some X`    this status for every other page, the store's own for the rest
        `short`     fewer answers than keys
        `negate`    pages are read, then spoiled, and reported good (a lying pool)
        `torn S`    after S seconds pages are spoiled and reported failed
    A file `die` with `OPERATION SESSION MS` kills the server of that session in its next call.
    """

    name = "e2e_faulty"

    def __init__(self, inner: PageStore, control: Path) -> None:
        self._inner = inner
        self._control = control

    def problems(self) -> list[str]:
        return self._inner.problems()

    def unreachable(self) -> str:
        return self._inner.unreachable()

    def open(self, context: StoreContext) -> None:
        self._inner.open(context)
        StallProbe(self._control / "stalls").start()

    def exists(self, keys: Sequence[str]) -> list[PageStatus]:
        return self._disturbed("exists", keys, lambda: self._inner.exists(keys))

    def get(self, keys: Sequence[str], pages: PageBatch) -> list[PageStatus]:
        answers = self._disturbed("get", keys, lambda: self._inner.get(keys, pages))
        mode = self._mode("get")
        if mode[:1] == ["torn"]:
            time.sleep(float(mode[1]))
        if mode[:1] in (["torn"], ["negate"]):
            _negate(pages)
        return [PageStatus.FAILED] * len(keys) if mode[:1] == ["torn"] else answers

    def put(self, keys: Sequence[str], pages: PageBatch) -> list[PageStatus]:
        return self._disturbed("put", keys, lambda: self._inner.put(keys, pages))

    def stats(self) -> StoreStats:
        return self._inner.stats()

    def close(self) -> None:
        self._inner.close()

    def _mode(self, operation: str) -> list[str]:
        try:
            return (self._control / operation).read_text().split()
        except FileNotFoundError:
            return []

    def _disturbed(self, operation: str, keys: Sequence[str], call: Any) -> list[PageStatus]:
        """What `call` answers, or what the mode of the moment makes of it."""
        self._die_if_told(operation)
        mode = self._mode(operation)
        if not mode:
            answers: list[PageStatus] = call()
            return answers
        with (self._control / "calls").open("a") as calls:
            calls.write(f"{operation} {mode[0]} {len(keys)}\n")
        if mode[0] == "raise":
            raise StoreUnavailable(operation, "injected by a test")
        if mode[0] == "crash":
            raise RuntimeError("injected by a test")
        if mode[0] in ("missing", "answer"):
            return [PageStatus(mode[-1])] * len(keys)
        self._wait(operation, mode)
        answers = call()
        if mode[0] == "some":
            answers = [PageStatus(mode[1]) if i % 2 else a for i, a in enumerate(answers)]
        return answers[:-1] if mode[0] == "short" else answers

    def _wait(self, operation: str, mode: list[str]) -> None:
        if mode[0] == "delay":
            time.sleep(float(mode[1]))
        deadline_s = time.monotonic() + LONGEST_HANG_S
        while mode[0] == "hang" and self._mode(operation) == mode:
            if time.monotonic() > deadline_s:
                break
            time.sleep(0.02)

    def _die_if_told(self, operation: str) -> None:
        told = self._mode("die")
        if told[:2] == [operation, str(os.getsid(0))]:
            server = os.getpgid(0)
            threading.Timer(float(told[2]) / 1e3, os.killpg, (server, signal.SIGKILL)).start()


def _negate(pages: PageBatch) -> None:
    """Flip the sign of every float32 of these pages: what a pool that mixes up bytes would do."""
    for row in pages.addresses:
        for address, length in zip(row.tolist(), pages.lengths_bytes, strict=True):
            raw = np.ctypeslib.as_array((ctypes.c_uint8 * length).from_address(address))
            raw[3::4] ^= 0x80
