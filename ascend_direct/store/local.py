# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""The embedded store: one LMDB file that the processes of a host share, on tmpfs or SSD.

Owns what is in the file and its eviction. Does not own opening it (local_file), copies (host_copy),
threads and deadlines (transfer), keys (page_key), or pages of other hosts (memcache).

A process may be killed at any moment: every change is one LMDB transaction, its writer lock is
robust, and the reader slots of dead processes are cleared. Three tables:
    objects  key → header + page        stamps  key → stamp of its last use        ages  stamp → key
Eviction is approximately LRU: uses are noted in memory and written in batches.
The file never grows past size_bytes (LMDB's map size); up to an eighth of it is not for pages:
LMDB copies on write, and reuses freed space only two transactions later. LMDB's `writemap` stays
off: storing into a mapped page that a full disk cannot back is a SIGBUS; write() says ENOSPC.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import struct
import threading
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lmdb

from ascend_direct.config import MIB, DirectConfig, LocalConfig
from ascend_direct.errors import ConfigError, StoreUnavailable
from ascend_direct.store import base
from ascend_direct.store.base import PageBatch, PageStatus, StoreContext, StoreStats
from ascend_direct.store.host_copy import HostSpans
from ascend_direct.store.local_file import open_environment

_log = logging.getLogger(__name__)

_FORMAT = 2
_HEADER = struct.Struct("<4sIQI")  # magic, format, page bytes, checksum: LMDB has none of its own
_TABLES = (b"objects", b"stamps", b"ages")
_WRITE_BYTES = 8 * MIB  # per transaction, so that other processes get their turn
_HEADROOM_BYTES = 256 * MIB
# Ages are written after this many uses, or at the first use after this time: a few ms each.
_NOTED_USES = 1024
_NOTED_S = 5.0
_ATTEMPTS = 3
_CLEARED_PAGES = 1024
_CLOSE_WAIT_S = 10.0
_NO_ROOM = (lmdb.MapFullError, lmdb.TxnFullError, lmdb.DiskError, lmdb.MemoryError, MemoryError)
# Codes without a class of their own; EIO is what LMDB makes of a write cut short by a full disk.
_NO_ROOM_CODES = {errno.EIO, errno.EFBIG, errno.EDQUOT}


def create(section: dict[str, Any]) -> base.PageStore:
    """Entry point `local`: a store from the configuration section ``local``, not yet open.

    Raises:
        ConfigError: with every problem of the section.
    """
    return LocalStore(DirectConfig.load({"local": section}, environ={}).local)


class LocalStore(base.PageStore):
    """Pages in an LMDB file; the module's docstring tells what it promises."""

    name = "local"

    def __init__(self, config: LocalConfig) -> None:
        self._config = config
        self._path = Path(config.path).expanduser().resolve()
        headroom_bytes = min(config.size_bytes // 8, _HEADROOM_BYTES)
        self._capacity_bytes = config.size_bytes - headroom_bytes
        self._write_bytes = min(headroom_bytes // 4, _WRITE_BYTES)
        self._env: Any = None
        self._pid = 0
        self._calls = 0
        self._lock = threading.Condition()
        self._writer = threading.Lock()
        self._uses: dict[bytes, None] = {}
        self._noted = 0
        self._noted_until_s = 0.0
        self._no_room = ""

    def problems(self) -> list[str]:
        try:
            env, _ = open_environment(self._path, self._config, _TABLES)
        except ConfigError as error:
            return list(error.reasons)
        env.close()
        return []

    def open(self, context: StoreContext) -> None:
        if context.memory is not base.Memory.HOST:
            raise ConfigError(["the local store needs host-visible KV; use memcache on an NPU."])
        self._env, tables = open_environment(self._path, self._config, _TABLES)
        self._objects, self._stamps, self._ages = tables
        self._pid = os.getpid()

    def exists(self, keys: Sequence[str]) -> list[PageStatus]:
        names = [_encoded(key) for key in keys]
        with self._call("exists") as env:
            return _answers(names, self._held(env, names), PageStatus.MISSING)

    def get(self, keys: Sequence[str], pages: PageBatch) -> list[PageStatus]:
        names, spans = [_encoded(key) for key in keys], HostSpans(pages)
        rows = zip(names, range(len(pages)), strict=True)
        with self._call("get") as env:
            with env.begin(db=self._objects, buffers=True) as txn:
                answers = [_read(txn, name, spans, row, pages.page_bytes) for name, row in rows]
            self._note_uses(env, names, answers)
        return answers

    def put(self, keys: Sequence[str], pages: PageBatch) -> list[PageStatus]:
        names, spans = [_encoded(key) for key in keys], HostSpans(pages)
        rows = list(zip(names, range(len(pages)), strict=True))
        step = max(1, self._write_bytes // (pages.page_bytes + _HEADER.size))
        stored: set[bytes] = set()
        with self._call("put") as env, self._writer:
            for first in range(0, len(rows), step):
                # Backwards: of two rows with one key the first stays. And a prefix page becomes
                # younger than those that need it, so that eviction takes the tail first.
                some = {name: row for name, row in rows[first : first + step][::-1] if name}
                stored |= self._put_some(env, some, spans, pages.page_bytes)
        return _answers(names, stored, PageStatus.FULL)

    def clear(self, prefix: str) -> int | None:
        start, removed = prefix.encode(), 0
        with self._call("clear") as env, self._writer:
            while True:  # in steps, so that servers get their turn
                with env.begin(write=True) as txn, txn.cursor(db=self._stamps) as cursor:
                    names = cursor.iternext(values=False) if cursor.set_range(start) else ()
                    some = list(itertools.islice(names, _CLEARED_PAGES))
                    some = [name for name in some if name.startswith(start)]
                    for name in some:
                        txn.delete(txn.get(name, db=self._stamps), db=self._ages)
                        txn.delete(name, db=self._stamps)
                        txn.delete(name, db=self._objects)
                if not some:
                    return removed
                removed += len(some)

    def stats(self) -> StoreStats:
        try:
            with self._call("stats") as env, env.begin() as txn:
                pages, used_bytes = txn.stat(self._stamps)["entries"], self._live_bytes(txn)
        except StoreUnavailable:
            return StoreStats(capacity_bytes=self._capacity_bytes)
        return StoreStats(pages, used_bytes, self._capacity_bytes)

    def close(self) -> None:
        with self._lock:
            env, self._env = self._env, None
            if env is None or self._pid != os.getpid():
                return
            if not self._lock.wait_for(lambda: not self._calls, _CLOSE_WAIT_S):
                # Unmapping the file under a running copy would kill the process.
                _log.warning("%s stays mapped: a call is still running", self._path)
                return
        self._write_uses(env)
        env.close()

    @contextmanager
    def _call(self, operation: str) -> Iterator[Any]:
        """The environment, not closed while inside; what LMDB raises becomes ours."""
        if self._env is not None and self._pid != os.getpid():
            raise StoreUnavailable(operation, "opened before a fork; open one store per process")
        with self._lock:
            env = self._env
            if env is None:
                raise StoreUnavailable(operation, "the local store is not open")
            self._calls += 1
        try:
            yield env
        except (lmdb.Error, SystemError) as error:  # the binding's answer to a damaged file
            raise StoreUnavailable(operation, f"{self._path}: {error}") from error
        finally:
            with self._lock:
                self._calls -= 1
                self._lock.notify_all()

    def _held(self, env: Any, names: Iterable[bytes | None]) -> set[bytes]:
        # Asked of `stamps`: LMDB's Python binding touches every page of a value it returns.
        with env.begin(db=self._stamps) as txn:
            return {name for name in names if name and txn.get(name) is not None}

    def _put_some(
        self, env: Any, rows: dict[bytes, int], spans: HostSpans, page_bytes: int
    ) -> set[bytes]:
        """One transaction's worth of pages; returns those that are stored now."""
        held = self._held(env, rows)
        new = [name for name in rows if name not in held]
        need_bytes = len(new) * (page_bytes + _HEADER.size)
        fits = page_bytes < self._capacity_bytes
        for attempt in range(_ATTEMPTS if fits else 0):
            try:
                if attempt:
                    self._make_room(env, need_bytes)
                objects = {name: _object(name, spans, rows[name], page_bytes) for name in new}
                with env.begin(write=True) as txn:
                    self._stamp(txn, [*self._take_uses(), *held])
                    if new and self._live_bytes(txn) + need_bytes > self._capacity_bytes:
                        self._evict(txn, self._capacity_bytes - need_bytes - self._write_bytes)
                    for name, value in objects.items():
                        txn.put(name, value, db=self._objects, overwrite=False)
                    self._stamp(txn, new, create=True)
                return held.union(new)
            except (lmdb.Error, MemoryError) as error:
                self._require_no_room(error)
        return self._held(env, rows)

    def _require_no_room(self, error: Exception) -> None:
        """Raise `error` unless it means that there is no room; log each kind once."""
        if not isinstance(error, _NO_ROOM) and getattr(error, "code", 0) not in _NO_ROOM_CODES:
            raise error
        if self._no_room != str(error):
            self._no_room = str(error)
            _log.warning("local store %s has no room: %s", self._path, error)

    def _make_room(self, env: Any, need_bytes: int) -> None:
        """Free space in two transactions: the next one may then reuse what the first freed."""
        env.reader_check()
        for _ in range(2):
            with env.begin(write=True) as txn:
                self._evict(txn, self._live_bytes(txn) - need_bytes)
        time.sleep(0.01)  # a running get pins what it reads

    def _evict(self, txn: Any, target_bytes: int) -> None:
        with txn.cursor(db=self._ages) as oldest:
            while self._live_bytes(txn) > target_bytes and oldest.first():
                name = oldest.value()
                txn.delete(name, db=self._objects)
                txn.delete(name, db=self._stamps)
                oldest.delete()

    def _live_bytes(self, txn: Any) -> int:
        """Space of what is stored, exact for all processes: LMDB counts it."""
        stats = [txn.stat(table) for table in (self._objects, self._stamps, self._ages)]
        pages = sum(s["overflow_pages"] + s["leaf_pages"] + s["branch_pages"] for s in stats)
        return int(pages * stats[0]["psize"])

    def _stamp(self, txn: Any, names: Iterable[bytes], *, create: bool = False) -> None:
        """Make `names` the youngest, in their order; without `create` only those still stored."""
        with txn.cursor(db=self._ages) as youngest:
            last = int.from_bytes(youngest.key(), "big") if youngest.last() else 0
        for number, name in enumerate(names, last + 1):
            old, new = txn.get(name, db=self._stamps), number.to_bytes(8, "big")
            if old is not None:
                txn.delete(old, db=self._ages)
            if old is not None or create:
                txn.put(name, new, db=self._stamps)
                txn.put(new, name, db=self._ages, append=True)

    def _note_uses(
        self, env: Any, names: Sequence[bytes | None], answers: Sequence[PageStatus]
    ) -> None:
        pairs = zip(names[::-1], answers[::-1], strict=True)
        used = dict.fromkeys(name for name, answer in pairs if name and answer is PageStatus.OK)
        with self._lock:
            self._uses.update(used)
            self._noted += len(used)
            is_due = self._noted >= _NOTED_USES or time.monotonic() > self._noted_until_s
        if used and is_due:
            self._write_uses(env)

    def _take_uses(self) -> list[bytes]:
        with self._lock:
            names, self._uses = list(self._uses), {}
            self._noted, self._noted_until_s = 0, time.monotonic() + _NOTED_S
        return names

    def _write_uses(self, env: Any) -> None:
        try:
            with env.begin(write=True) as txn:
                self._stamp(txn, self._take_uses())
        except lmdb.Error as error:  # lost ages only make eviction less exact
            _log.debug("local store %s: ages not written: %s", self._path, error)


def _encoded(key: str) -> bytes | None:
    name = key.encode("utf-8", "surrogatepass")
    return name if 0 < len(name) <= base.MAX_KEY_BYTES else None


def _answers(
    names: Sequence[bytes | None], held: set[bytes], otherwise: PageStatus
) -> list[PageStatus]:
    return [
        PageStatus.FAILED if name is None else PageStatus.OK if name in held else otherwise
        for name in names
    ]


def _read(txn: Any, name: bytes | None, spans: HostSpans, row: int, page_bytes: int) -> PageStatus:
    if name is None:
        return PageStatus.FAILED
    value = txn.get(name)  # faults the pages in without the GIL; the copy only moves bytes
    if value is None:
        return PageStatus.MISSING
    page = value[_HEADER.size :]
    if len(page) != page_bytes or value[: _HEADER.size] != _header(name, page):
        return PageStatus.MISMATCH
    spans.scatter(row, value, _HEADER.size)
    return PageStatus.OK


def _object(name: bytes, spans: HostSpans, row: int, page_bytes: int) -> bytearray:
    value = bytearray(_HEADER.size + page_bytes)
    spans.gather(row, value, _HEADER.size)
    value[: _HEADER.size] = _header(name, memoryview(value)[_HEADER.size :])
    return value


def _header(name: bytes, page: Any) -> bytes:
    checksum = zlib.crc32(page, zlib.crc32(name))
    return _HEADER.pack(b"ADKV", _FORMAT, len(page), checksum)
