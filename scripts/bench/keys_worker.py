# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Fills a pool with keys, then times lookups in it, in a process of its own.

Owns the measurement; `bench.transfer_parts` owns the pools and the order of questions. Asked over
standard input, a JSON object a line, and answers likewise, so that several pools of different size
can be asked in turns.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ascend_direct.beliefs import Beliefs
from ascend_direct.config import DirectConfig
from ascend_direct.device import Device
from ascend_direct.metrics import Metrics
from ascend_direct.page_layout import PageLayout, Span
from ascend_direct.store.base import StoreContext
from ascend_direct.store.memcache import DIRECTIONS, MemcacheStore
from ascend_direct.transfer import TransferEngine, TransferLimits
from bench import worker

CALL_KEYS = 4096
TIMEOUT_S = 120.0
BELIEF_TTL_S = 3600.0


@dataclass(frozen=True)
class Task:
    """What to fill the pool with; crosses to the worker as JSON."""

    config: dict[str, Any]
    stored: int
    object_bytes: int


def keys_of(numbers: Sequence[int]) -> list[str]:
    """Keys as a rank of a GQA model has them."""
    hashes = (hashlib.sha256(b"%d" % number).hexdigest() for number in numbers)
    return [f"ad1:0123456789abcdef:h0-1:{page_hash}" for page_hash in hashes]


class Keys:
    """A pool with `stored` keys, 0 to `stored` − 1 by number."""

    def __init__(self, task: Task) -> None:
        self._stored = task.stored
        self._object = np.zeros(task.object_bytes, np.uint8)
        store = MemcacheStore(DirectConfig.load(task.config, environ={}).memcache)
        store.open(StoreContext())
        self.store, self._native, self._replicate = store, store._native, store._replicate
        span = Span(0, "k", self._object.ctypes.data, task.object_bytes, task.object_bytes)
        layout = PageLayout((span,), num_pages=2, page_size_tokens=64, tag="bench")
        limits = TransferLimits(TIMEOUT_S, TIMEOUT_S, TIMEOUT_S, 1 << 30, 1 << 30)
        self.engine = TransferEngine(
            store, layout, Device("cpu"), limits, Metrics(), lambda keys: None
        )
        self.engine.start()

    def fill(self) -> dict[str, float]:
        """Put every key; microseconds per key, in calls of CALL_KEYS."""
        put, _ = DIRECTIONS[Device("cpu").memory]
        spent_s = 0.0
        for start in range(0, self._stored, CALL_KEYS):
            keys = keys_of(range(start, min(start + CALL_KEYS, self._stored)))
            rows = [[self._object.ctypes.data]] * len(keys)
            sizes = [[len(self._object)]] * len(keys)
            begin_s = time.perf_counter()
            codes = self._native.batch_put_from_layers(keys, rows, sizes, put, self._replicate)
            spent_s += time.perf_counter() - begin_s
            if list(codes) != [0] * len(keys):
                raise RuntimeError(f"put answered {set(codes)} after {start} keys")
        return {"put_us_per_key": 1e6 * spent_s / self._stored}

    def ask(self, asked: int) -> dict[str, float]:
        """Seconds of one question each way about `asked` keys, in an order of chance.

        Each is about other keys: what one has brought into MetaService's caches helps no other.
        """
        ours, exist = self.engine.stored_prefix, self._native.batch_is_exist
        ways: list[tuple[str, bool, Callable[[list[str]], Any], Any]] = [
            ("bare, all there", True, lambda keys: list(exist(keys)), [1] * asked),
            ("ours, all there", True, ours, asked),
            ("bare, none there", False, lambda keys: list(exist(keys)), [0] * asked),
            ("ours, none there", False, ours, 0),
        ]
        seconds = {way: 0.0 for way, *_ in ways}
        for way, there, call, right in random.sample(ways, len(ways)):
            # Neighbouring numbers have hashes far apart.
            first = random.randrange(self._stored - asked + 1) + (0 if there else self._stored)
            keys = keys_of(range(first, first + asked))
            begin_s = time.perf_counter()
            answer = call(keys)
            seconds[way] = time.perf_counter() - begin_s
            if answer != right:
                raise RuntimeError(f"{way}: the pool answered wrongly about {asked} keys")
        return seconds


def beliefs(pages: int, asked: Sequence[int]) -> dict[str, float]:
    """What a full set of beliefs costs: bytes per key, microseconds per question."""
    tracemalloc.start()
    held = Beliefs(pages, BELIEF_TTL_S)
    for start in range(0, pages, CALL_KEYS):
        held.confirm(keys_of(range(start, min(start + CALL_KEYS, pages))))
    bytes_held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    found = {"bytes": float(bytes_held), "bytes_per_key": bytes_held / max(1, len(held))}
    for count in asked:
        keys = keys_of(range(pages - count, pages))
        begin_s = time.perf_counter()
        if held.prefix(keys) != count:
            raise RuntimeError("beliefs were lost")
        found[f"prefix_{count}_us"] = 1e6 * (time.perf_counter() - begin_s)
    return found


def _questions() -> Iterator[dict[str, Any]]:
    for line in sys.stdin:
        yield json.loads(line)


def main(arguments: str) -> None:
    """Fill, say so, answer until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the native library prints

    def answer(line: dict[str, float]) -> None:
        print(json.dumps(line), file=answers, flush=True)

    keys = Keys(Task(**json.loads(arguments)))
    try:
        answer(keys.fill())
        for question in _questions():
            if "beliefs" in question:
                answer(beliefs(question["beliefs"], question["asked"]))
            else:
                answer(keys.ask(question["asked"]))
    finally:
        keys.engine.close()


if __name__ == "__main__":
    worker.run(main)
