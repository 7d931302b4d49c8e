# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""A page store inside one process: real behaviour, plus faults on demand.

Owns a pool that several stores may share (as servers share one), real copies from and to addresses,
LRU eviction, counters, and fault injection per operation. Passes tests/contract like any store.
Does not own processes, files or time limits; never used outside tests.

    pool = MemoryPool(capacity_bytes=1 << 20)
    store = MemoryStore(pool)
    store.open(StoreContext())
    store.faults["get"].statuses["some key"] = PageStatus.UNAVAILABLE
    store.faults["get"].before = lambda keys: pool.drop(keys[0])  # evicted after the lookup
    store.faults["put"].hold()  # calls wait until release(); entered.wait() tells when one does
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from ascend_direct.errors import StoreUnavailable
from ascend_direct.store.base import (
    MAX_KEY_BYTES,
    PageBatch,
    PageStatus,
    PageStore,
    StoreContext,
    StoreStats,
)

OPERATIONS = ("exists", "get", "put")
HOLD_LIMIT_S = 60.0
_SCRIBBLE = 0xA5


@dataclass
class Fault:
    """What goes wrong in one operation; fields may be changed while the store is in use.

    Attributes:
        delay_ms: every call takes at least this long.
        statuses: answer for these keys whatever the pool holds. A failed get first scribbles over
            half of the page, as the contract allows; a failed put stores nothing.
        fails_after_keys: raise StoreUnavailable once this many keys are done (0: at once).
        before: called with the keys before the pool is touched, on the caller's thread.
        entered: set when a call arrives while held.
    """

    delay_ms: float = 0.0
    statuses: dict[str, PageStatus] = field(default_factory=dict)
    fails_after_keys: int | None = None
    before: Callable[[Sequence[str]], None] | None = None
    entered: threading.Event = field(default_factory=threading.Event)
    _gate: threading.Event | None = None

    def hold(self) -> None:
        """Make calls wait until `release`."""
        self.entered.clear()
        self._gate = threading.Event()

    def release(self) -> None:
        """Let waiting and later calls go on."""
        gate, self._gate = self._gate, None
        if gate is not None:
            gate.set()

    def strike(self, operation: str, keys: Sequence[str]) -> None:
        """The part of a fault that comes before the pool is touched."""
        gate = self._gate
        if gate is not None:
            self.entered.set()
            if not gate.wait(HOLD_LIMIT_S):
                raise StoreUnavailable(operation, f"held for {HOLD_LIMIT_S:.0f} s, never released")
        if self.delay_ms:
            time.sleep(self.delay_ms / 1000)
        if self.before is not None:
            self.before(keys)


@dataclass
class Count:
    """What one operation did so far. `ok_pages` and `ok_bytes` count pages answered OK."""

    calls: int = 0
    keys: int = 0
    ok_pages: int = 0
    ok_bytes: int = 0


class MemoryPool:
    """Objects by key, least recently used first; shared by the stores of several instances.

    Args:
        capacity_bytes: bound on the stored bytes; None for none.
        evicts: make room by dropping old pages; else a put past the bound answers FULL.
    """

    def __init__(self, capacity_bytes: int | None = None, *, evicts: bool = True) -> None:
        self.capacity_bytes = capacity_bytes
        self.evicts = evicts
        self.evicted_pages = 0
        self.lock = threading.RLock()
        self._objects: OrderedDict[str, bytes] = OrderedDict()
        self._used_bytes = 0

    def __contains__(self, key: str) -> bool:
        return key in self._objects

    def __len__(self) -> int:
        return len(self._objects)

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    def keys(self) -> list[str]:
        """All keys, least recently used first."""
        with self.lock:
            return list(self._objects)

    def read(self, key: str) -> bytes | None:
        """The object, now the most recently used; None if absent."""
        with self.lock:
            if key in self._objects:
                self._objects.move_to_end(key)
            return self._objects.get(key)

    def write(self, key: str, data: bytes) -> bool:
        """Store unless the key exists; False when there is no room."""
        with self.lock:
            if key in self._objects:
                self._objects.move_to_end(key)
                return True
            if not self._make_room(len(data)):
                return False
            self._objects[key] = data
            self._used_bytes += len(data)
            return True

    def drop(self, *keys: str) -> None:
        """Remove keys, as an eviction or a lost member would."""
        with self.lock:
            for key in keys:
                self._used_bytes -= len(self._objects.pop(key, b""))

    def clear(self) -> None:
        """Remove everything."""
        self.drop(*self.keys())

    def _make_room(self, size_bytes: int) -> bool:
        if self.capacity_bytes is None:
            return True
        if size_bytes > self.capacity_bytes:
            return False
        while self._used_bytes + size_bytes > self.capacity_bytes:
            if not self.evicts:
                return False
            self.drop(next(iter(self._objects)))
            self.evicted_pages += 1
        return True


class MemoryStore(PageStore):
    """One instance's view of a `MemoryPool`."""

    name = "memory"

    def __init__(self, pool: MemoryPool | None = None) -> None:
        self.pool = MemoryPool() if pool is None else pool
        self.faults = {operation: Fault() for operation in OPERATIONS}
        self.counts = {operation: Count() for operation in OPERATIONS}
        self.context: StoreContext | None = None
        self.closes = 0
        self._open = False
        self._lock = threading.Lock()

    def open(self, context: StoreContext) -> None:
        self.context = context
        self._open = True

    def exists(self, keys: Sequence[str]) -> list[PageStatus]:
        answers = []
        for key in self._keys("exists", keys):
            status = self._verdict("exists", key)
            if status is None:
                status = PageStatus.OK if key in self.pool else PageStatus.MISSING
            answers.append(status)
        self._count("exists", answers, page_bytes=0)
        return answers

    def get(self, keys: Sequence[str], pages: PageBatch) -> list[PageStatus]:
        _check_rows(keys, pages)
        answers = []
        for row, key in enumerate(self._keys("get", keys)):
            status = self._verdict("get", key)
            if status is not None:
                _scribble(pages, row)
            else:
                status = self._read(key, pages, row)
            answers.append(status)
        self._count("get", answers, pages.page_bytes)
        return answers

    def put(self, keys: Sequence[str], pages: PageBatch) -> list[PageStatus]:
        _check_rows(keys, pages)
        answers = []
        for row, key in enumerate(self._keys("put", keys)):
            status = self._verdict("put", key)
            if status is None:
                stored = self.pool.write(key, bytes_of_page(pages, row))
                status = PageStatus.OK if stored else PageStatus.FULL
            answers.append(status)
        self._count("put", answers, pages.page_bytes)
        return answers

    def stats(self) -> StoreStats:
        if not self._open:
            return StoreStats()
        return StoreStats(len(self.pool), self.pool.used_bytes, self.pool.capacity_bytes)

    def close(self) -> None:
        self.closes += 1
        self._open = False
        for fault in self.faults.values():
            fault.release()

    def _keys(self, operation: str, keys: Sequence[str]) -> Iterator[str]:
        """The keys one by one, with the faults that end a call as a whole."""
        fault, count = self.faults[operation], self.counts[operation]
        self._raise_if_closed(operation)
        with self._lock:
            count.calls += 1
            count.keys += len(keys)
        fault.strike(operation, keys)
        self._raise_if_closed(operation)
        for done in range(len(keys) + 1):
            if fault.fails_after_keys == done:
                raise StoreUnavailable(operation, f"injected after {done} keys")
            yield from keys[done : done + 1]

    def _raise_if_closed(self, operation: str) -> None:
        if not self._open:
            raise StoreUnavailable(operation, "the store is not open")

    def _verdict(self, operation: str, key: str) -> PageStatus | None:
        """The answer where the pool is not asked; only `exists` can be made to lie with an OK."""
        injected = self.faults[operation].statuses.get(key)
        if injected is not None and (operation == "exists" or injected is not PageStatus.OK):
            return injected
        return None if 0 < len(key.encode()) <= MAX_KEY_BYTES else PageStatus.FAILED

    def _read(self, key: str, pages: PageBatch, row: int) -> PageStatus:
        data = self.pool.read(key)
        if data is None:
            return PageStatus.MISSING
        if len(data) != pages.page_bytes:
            return PageStatus.MISMATCH
        offset = 0
        for address, length in zip(pages.addresses[row], pages.lengths_bytes, strict=True):
            ctypes.memmove(int(address), data[offset : offset + length], length)
            offset += length
        return PageStatus.OK

    def _count(self, operation: str, answers: Sequence[PageStatus], page_bytes: int) -> None:
        ok_pages = sum(status is PageStatus.OK for status in answers)
        with self._lock:
            self.counts[operation].ok_pages += ok_pages
            self.counts[operation].ok_bytes += ok_pages * page_bytes


def bytes_of_page(pages: PageBatch, row: int) -> bytes:
    """What the memory of one page holds now, as it would be stored."""
    spans = zip(pages.addresses[row], pages.lengths_bytes, strict=True)
    return b"".join(ctypes.string_at(int(address), length) for address, length in spans)


def _scribble(pages: PageBatch, row: int) -> None:
    spans = list(zip(pages.addresses[row], pages.lengths_bytes, strict=True))
    for address, length in spans[: max(1, len(spans) // 2)]:
        ctypes.memset(int(address), _SCRIBBLE, length)


def _check_rows(keys: Sequence[str], pages: PageBatch) -> None:
    if len(keys) != len(pages):
        raise ValueError(f"{len(keys)} keys for {len(pages)} pages")
