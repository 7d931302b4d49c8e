# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Times transfers of one shape in a process of its own, which the native client demands.

Owns the measurement; `bench.transfer` owns the pool, the choice of cases and what is shown. Every
read is compared with what was written before its time counts. Rounds are interleaved: within one
round each way moves the same pages once, in an order of chance, and all reads are of the same
objects.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ascend_direct.config import DirectConfig
from ascend_direct.device import PASSED, Device
from ascend_direct.metrics import Metrics
from ascend_direct.store.base import Memory, StoreContext
from ascend_direct.store.memcache import DIRECTIONS, MemcacheStore
from ascend_direct.store.packed import PackedStore
from ascend_direct.store.page_packer import HostBlock
from ascend_direct.transfer import StoreJob, TransferEngine, TransferLimits
from ascend_direct.transfer.courier import Courier
from bench import worker
from bench.shapes import SHAPES, Pool

PUT, GET = DIRECTIONS[Memory.HOST]
CALL_TIMEOUT_S = 120.0
MIB = 2**20
# Written over before a way's clock runs: several times the caches of one core and what they share.
OTHER_MEMORY_BYTES = 256 * MIB


@dataclass(frozen=True)
class Task:
    """What one worker is to do; crosses to it as JSON.

    Attributes:
        in_flight: bare gets at a time, each number a way of its own.
        batch_bytes: of the plugin's loads and stores.
        other_batches: further sizes, each a way to load of its own.
        packed: also load with each page packed into one piece, on the way.
        one_core: this thread and those that load for it share a core.
    """

    config: dict[str, Any]
    shape: str
    pages: list[int]
    rounds: int
    in_flight: list[int]
    batch_bytes: int
    other_batches: list[int] = field(default_factory=list)
    packed: bool = False
    one_core: bool = False


class Joined:
    """A store that is open already, for decorators that would open it."""

    def __init__(self, store: MemcacheStore) -> None:
        self._store = store

    def open(self, context: StoreContext) -> None:
        """It has joined the pool."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


class Case:
    """One number of pages: the ways to move them, each returning seconds."""

    def __init__(self, store: MemcacheStore, task: Task, pages: int) -> None:
        self.pool = Pool(SHAPES[task.shape], pages)
        self._native = store._native  # the bare call, on the one client a process can have
        self._replicate = store._replicate
        self._rng = np.random.default_rng(pages)
        self.numbers = self._rng.permutation(np.arange(1, pages + 1))
        self._rows = self.pool.layout.addresses(self.numbers).tolist()
        self._sizes = [list(self.pool.layout.lengths_bytes)] * pages
        self._mirror = [np.empty((pages, b.shape[1]), np.uint8) for b in self.pool.buffers]
        self.engine = self._engine(store, task.batch_bytes)
        # Other ways to load, by name.
        self._loads = {
            f"load, {size // MIB} MiB a call": self._engine(store, size)
            for size in task.other_batches
            if size < pages * SHAPES[task.shape].page_bytes
        }
        if task.packed:
            packed: Any = PackedStore(
                Joined(store),  # type: ignore[arg-type]
                "packed",
                HostBlock,
                self.pool.layout.lengths_bytes,
            )
            packed.open(StoreContext())
            self._loads["load, packed"] = self._engine(packed, task.batch_bytes)
        self._in_flight = [n for n in task.in_flight if 1 < n <= pages]
        self._other_thread = Courier("bench", lambda: None)
        self._other_thread.start()
        self._other_memory = np.zeros(OTHER_MEMORY_BYTES, np.uint8)
        if task.one_core:
            self._share_core(min(os.sched_getaffinity(0)))
        self.pool.fill(self._rng)
        self._expected = self.pool.checksum(self.numbers)

    def _engine(self, store: Any, batch_bytes: int) -> TransferEngine:
        limits = TransferLimits(
            CALL_TIMEOUT_S, CALL_TIMEOUT_S, CALL_TIMEOUT_S, 1 << 40, batch_bytes
        )
        engine = TransferEngine(
            store, self.pool.layout, Device("cpu"), limits, Metrics(), lambda keys: None
        )
        engine.start()
        return engine

    def _share_core(self, core: int) -> None:
        os.sched_setaffinity(0, {core})
        loading = [engine._loading for engine in self._engines()]
        for thread in (self._other_thread, *loading):
            thread.call(lambda ticket: os.sched_setaffinity(0, {core}), CALL_TIMEOUT_S)

    def _engines(self) -> tuple[TransferEngine, ...]:
        return (self.engine, *self._loads.values())

    def end(self) -> None:
        """End the threads; the store stays open."""
        for engine in self._engines():
            engine.stores.stop()
            engine._loading.stop()
            engine._asking.stop()
        self._other_thread.stop()

    # ---- writes ----------------------------------------------------------------------------

    def copy(self, keys: Sequence[str]) -> float:
        """One thread, the same fragments, no pool: what the memory of this machine gives."""
        begin_s = time.perf_counter()
        for buffer, mirror in zip(self.pool.buffers, self._mirror, strict=True):
            # With mode "raise" numpy copies twice, so that an error leaves `out` as it was.
            np.take(buffer, self.numbers, axis=0, out=mirror, mode="clip")
        return time.perf_counter() - begin_s

    def bare_put(self, keys: Sequence[str]) -> float:
        """One native call, its arguments ready."""
        begin_s = time.perf_counter()
        codes = self._native.batch_put_from_layers(
            list(keys), self._rows, self._sizes, PUT, self._replicate
        )
        took_s = time.perf_counter() - begin_s
        _demand(list(codes) == [0] * len(keys), f"put answered {set(codes)}")
        return took_s

    def store(self, keys: Sequence[str]) -> float:
        """What a write-back does: queue, fence, ask, put."""
        job = StoreJob(list(keys), lambda: self.numbers, PASSED, 0)
        begin_s = time.perf_counter()
        self.engine.stores.submit(job)
        job.returned.wait(CALL_TIMEOUT_S)
        took_s = time.perf_counter() - begin_s
        _demand(self.engine.stores.pop(), "a store failed")
        return took_s

    # ---- reads -----------------------------------------------------------------------------

    def bare_get(self, keys: Sequence[str], threads: int = 1) -> float:
        """Native calls, their arguments ready; with `threads`, as many at a time."""
        shares = [slice(t, None, threads) for t in range(threads)]
        calls = [(list(keys[s]), self._rows[s], self._sizes[s]) for s in shares]
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(len, calls))  # the threads are up before the clock runs
            begin_s = time.perf_counter()
            if threads == 1:
                codes = list(self._native.batch_get_into_layers(*calls[0], GET))
            else:
                got = pool.map(lambda c: self._native.batch_get_into_layers(*c, GET), calls)
                codes = [code for part in got for code in part]
            took_s = time.perf_counter() - begin_s
        _demand(codes == [0] * len(keys), f"get answered {set(codes)}")
        return took_s

    def handed_over(self, keys: Sequence[str]) -> float:
        """The bare call on another thread, waited for: what any deadline costs."""
        call = (list(keys), self._rows, self._sizes)
        begin_s = time.perf_counter()
        ticket = self._other_thread.call(
            lambda ticket: self._native.batch_get_into_layers(*call, GET), CALL_TIMEOUT_S
        )
        took_s = time.perf_counter() - begin_s
        _demand(ticket is not None and list(ticket.result()) == [0] * len(keys), "get failed")
        return took_s

    def load(self, keys: Sequence[str], engine: TransferEngine | None = None) -> float:
        """What a request waits for."""
        begin_s = time.perf_counter()
        outcome = (engine or self.engine).load(list(keys), lambda: self.numbers, PASSED)
        took_s = time.perf_counter() - begin_s
        _demand(outcome.landed, "a load was refused")
        return took_s

    # ---- rounds ----------------------------------------------------------------------------

    def round(self, number: int) -> dict[str, float]:
        """Each way once; seconds by name."""
        keys = [f"bench:{number}:{page}" for page in self.numbers]
        own = [f"{key}:own" for key in keys]
        writes: list[tuple[str, Callable[[], float]]] = [
            ("memcpy", lambda: self.copy(keys)),
            ("bare put", lambda: self.bare_put(keys)),
            ("store", lambda: self.store(own)),
        ]
        reads: list[tuple[str, Callable[[], float]]] = [
            ("bare get", lambda: self.bare_get(keys)),
            ("bare get, other thread", lambda: self.handed_over(keys)),
            ("load", lambda: self.load(keys)),
        ]
        for name, engine in self._loads.items():
            reads.append((name, lambda e=engine: self.load(keys, e)))  # type: ignore[misc]
        for threads in self._in_flight:
            reads.append((f"bare get x{threads}", lambda t=threads: self.bare_get(keys, t)))  # type: ignore[misc]
        order = random.Random(number)
        times = {}
        for name, call in order.sample(writes, len(writes)):
            self._cool()
            times[name] = call()
        for name, call in order.sample(reads, len(reads)):
            times[name] = self._checked(name, call)
        self._checked("store", lambda: self.bare_get(own))
        self._native.remove_batch([*keys, *own])
        return times

    def _cool(self) -> None:
        """Take the pages out of the caches. Otherwise those of this thread's core hold them, and a
        call from here is faster than one from any other thread, which no server sees."""
        np.add(self._other_memory, 1, out=self._other_memory)  # filling it would go past the caches

    def _checked(self, name: str, read: Callable[[], float]) -> float:
        self.pool.clear()
        self._cool()
        took_s = read()
        arrived = self.pool.checksum(self.numbers) == self._expected
        _demand(arrived, f"{name}: wrong bytes arrived")
        return took_s


def _demand(holds: bool, message: str) -> None:
    if not holds:
        raise RuntimeError(message)


def main(arguments: str, out_path: str) -> None:
    """Run all cases of a task; one JSON line per case, written when it is done."""
    task = Task(**json.loads(arguments))
    store = MemcacheStore(DirectConfig.load(task.config, environ={}).memcache)
    store.open(StoreContext())
    try:
        with Path(out_path).open("a", encoding="utf-8") as out:
            for pages in task.pages:
                case = Case(store, task, pages)
                case.round(0)  # first touches of memory and of the pool
                rounds = [case.round(n) for n in range(1, task.rounds + 1)]
                case.end()
                times = {name: [r[name] for r in rounds] for name in rounds[0]}
                line = {"kind": "move", "shape": task.shape, "pages": pages, "seconds": times}
                out.write(json.dumps(line) + "\n")
                out.flush()
    finally:
        store.close()


if __name__ == "__main__":
    worker.run(main)
