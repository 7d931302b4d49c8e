# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Real MemCache processes for tests: the emulation must be there before a process starts.

Owns three kinds: `StoreProcess`, a MemcacheStore in a process of its own that behaves like a store
here; `PoolMember`, the command `ascend-direct pool member`; `FixedMetaService`, one that can be
killed and come back at its addresses. Each ends only the process it started.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from ascend_direct.errors import ConfigError, StoreUnavailable
from ascend_direct.store.base import (
    Memory,
    PageBatch,
    PageStatus,
    PageStore,
    StoreContext,
    StoreStats,
)
from tests.contract.store_contract import Arena

ROOT = Path(__file__).resolve().parents[2]
CALL_TIMEOUT_S = 90.0
NULL_OFFSET = -1
COMMAND = "ascend_direct.cli.main"
EXIT_UNAVAILABLE = 3
LOG_TAIL_CHARS = 4000


class SharedArena(Arena):
    """An arena that a StoreProcess maps too; `bytes` is a file on a tmpfs."""

    def __init__(self, path: Path, size_bytes: int = 1 << 20) -> None:
        self.path = path
        self.alignment_bytes = 1
        mode = "r+" if path.exists() else "w+"
        self.bytes = np.memmap(path, dtype=np.uint8, mode=mode, shape=(size_bytes,))
        self.address = self.bytes.ctypes.data


class StoreProcess(PageStore):
    """A MemcacheStore in another process. Calls from several threads run there at once."""

    name = "memcache"

    def __init__(
        self,
        environment: Mapping[str, str],
        section: Mapping[str, Any],
        arena: SharedArena,
        log_path: Path,
        prefix: Sequence[str] = (),
    ) -> None:
        self._arena = arena
        self._numbers = itertools.count()
        self._waiting: dict[int, Future[Any]] = {}
        self._lock = threading.Lock()
        self._pipe, theirs = Pipe()
        setup = json.dumps([dict(section), str(arena.path), len(arena.bytes)])
        with log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, "-m", __name__, str(theirs.fileno()), setup],
                cwd=ROOT,
                env={**os.environ, **environment},
                pass_fds=[theirs.fileno()],
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        theirs.close()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    # ---- as a store --------------------------------------------------------------------------

    def problems(self) -> list[str]:
        return list(self.call("problems"))

    def unreachable(self) -> str:
        return str(self.call("unreachable"))

    def open(self, context: StoreContext) -> None:
        self.call("open", context.memory.value, context.rank)

    def exists(self, keys: Sequence[str]) -> list[PageStatus]:
        return [PageStatus(value) for value in self.call("exists", list(keys))]

    def get(self, keys: Sequence[str], pages: PageBatch) -> list[PageStatus]:
        return [PageStatus(value) for value in self.call("get", list(keys), *self._moved(pages))]

    def put(self, keys: Sequence[str], pages: PageBatch) -> list[PageStatus]:
        return [PageStatus(value) for value in self.call("put", list(keys), *self._moved(pages))]

    def stats(self) -> StoreStats:
        return StoreStats(**self.call("stats"))

    def close(self) -> None:
        if self.process.poll() is None:
            self.call("close")

    # ---- as a process ------------------------------------------------------------------------

    @property
    def member_id(self) -> int:
        return int(self.call("member_id"))

    def call(self, method: str, *arguments: Any) -> Any:
        """Run a method of the worker; its errors are raised here."""
        number, future = next(self._numbers), Future[Any]()
        self._waiting[number] = future
        with self._lock:
            self._pipe.send((number, method, arguments))
        return future.result(CALL_TIMEOUT_S)

    def leave_by_exit(self) -> int:
        """Let the interpreter exit without a close; its exit status."""
        with self._lock:
            self._pipe.send((0, "exit", ()))
        return self.process.wait(CALL_TIMEOUT_S)

    def kill(self) -> None:
        """End the process at once, whatever it does."""
        self.process.kill()
        self.process.wait()
        self._reader.join(CALL_TIMEOUT_S)
        self._pipe.close()

    def _moved(self, pages: PageBatch) -> tuple[Any, tuple[int, ...]]:
        offsets = np.where(pages.addresses == 0, NULL_OFFSET, pages.addresses - self._arena.address)
        return offsets, pages.lengths_bytes

    def _read(self) -> None:
        try:
            while True:
                number, error, value = self._pipe.recv()
                future = self._waiting.pop(number)
                if error is None:
                    future.set_result(value)
                else:
                    future.set_exception({e.__name__: e for e in ERRORS}[error](*value))
        except (EOFError, OSError):
            for future in self._waiting.values():
                future.set_exception(ConnectionError("the store's process has ended"))


ERRORS: tuple[type[Exception], ...] = (StoreUnavailable, ConfigError, ValueError, RuntimeError)


class PoolMember:
    """`ascend-direct pool member`, from its first line to its exit code."""

    def __init__(
        self,
        environment: Mapping[str, str],
        section: Mapping[str, Any],
        log_path: Path,
        prefix: Sequence[str] = (),
    ) -> None:
        self._log_path = log_path
        config = json.dumps({"memcache": dict(section)})
        command = [sys.executable, "-m", COMMAND, "pool", "member", "--json", "--config", config]
        with log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [*prefix, *command],
                cwd=ROOT,
                env={**os.environ, **environment},
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def joined(self) -> dict[str, Any]:
        """Its first line of output.

        Raises:
            StoreUnavailable: the member gave up because it found no pool to join.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            code, log = self.process.wait(), self._log_path.read_text()[-LOG_TAIL_CHARS:]
            if code == EXIT_UNAVAILABLE:
                raise StoreUnavailable("join", f"the member gave up: {log}")
            raise AssertionError(f"the member ended with {code}: {log}")
        event: dict[str, Any] = json.loads(line)
        return event

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Exit status, and what else it printed."""
        self.process.send_signal(number)
        rest, _ = self.process.communicate(timeout=CALL_TIMEOUT_S)
        return self.process.returncode, rest

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


class FixedMetaService:
    """A MetaService with given ports, for tests that kill it and start it again."""

    def __init__(
        self,
        environment: Mapping[str, str],
        ports: Sequence[int],
        run_dir: Path,
        host: str = "127.0.0.1",
        prefix: Sequence[str] = (),
    ) -> None:
        meta, store, metrics = ports
        self.section = {
            "meta_service_url": f"tcp://{host}:{meta}",
            "config_store_url": f"tcp://{host}:{store}",
            "metrics_url": f"http://{host}:{metrics}",
        }
        self._config = json.dumps(
            {
                "meta_port": meta,
                "store_port": store,
                "metrics_port": metrics,
                "log_path": str(run_dir),
                "lease_ttl_ms": 100,
                "host": host,
            }
        )
        self._environment = environment
        self._run_dir = run_dir
        self._prefix = prefix
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with (self._run_dir / "fixed_meta_service.log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *self._prefix,
                    sys.executable,
                    str(ROOT / "scripts" / "memcache_pool.py"),
                    self._config,
                ],
                env={**os.environ, **self._environment},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process = None

    def __enter__(self) -> FixedMetaService:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()


# ---- inside a StoreProcess -----------------------------------------------------------------------


class _Worker:
    def __init__(self, section: dict[str, Any], arena_path: str, size_bytes: int) -> None:
        from ascend_direct.store.memcache import MemcacheStore, create

        self.arena = SharedArena(Path(arena_path), size_bytes)
        self.section = section
        store = create(section)
        assert isinstance(store, MemcacheStore)
        self.bare = store
        self.store: Any = store

    def run(self, method: str, *arguments: Any) -> Any:
        return getattr(self, method)(*arguments)

    def open(self, memory: str, rank: int) -> None:
        self.store.open(StoreContext(memory=Memory(memory), rank=rank))

    def problems(self) -> list[str]:
        return self.store.problems()

    def unreachable(self) -> str:
        return self.store.unreachable()

    def exists(self, keys: list[str]) -> list[str]:
        return [status.value for status in self.store.exists(keys)]

    def get(self, keys: list[str], offsets: Any, lengths: tuple[int, ...]) -> list[str]:
        return [status.value for status in self.store.get(keys, self._pages(offsets, lengths))]

    def put(self, keys: list[str], offsets: Any, lengths: tuple[int, ...]) -> list[str]:
        return [status.value for status in self.store.put(keys, self._pages(offsets, lengths))]

    def stats(self) -> dict[str, Any]:
        return dataclasses.asdict(self.store.stats())

    def close(self) -> None:
        self.store.close()

    def member_id(self) -> int:
        return self.store.member_id

    def open_a_second_store(self) -> None:
        from ascend_direct.store.memcache import create

        create(self.section).open(StoreContext())

    def signal_handlers(self) -> str:
        status = Path("/proc/self/status").read_text()
        return "\n".join(line for line in status.splitlines() if line.startswith("SigCgt"))

    def wrap(self, option: str) -> None:
        """As the factory does for an option."""
        from ascend_direct.store.attach import AttachingStore
        from ascend_direct.store.verified import VerifiedStore

        attach = option == "on_pool_unavailable"
        self.bare = self.store
        self.store = (
            AttachingStore(self.store) if attach else VerifiedStore(self.store, "all", lambda: None)
        )

    def remove(self, key: str) -> None:
        """As an eviction would."""
        assert self.bare._native.remove(key) == 0

    def put_unverified(self, keys: list[str], offsets: Any, lengths: tuple[int, ...]) -> None:
        assert self.bare.put(keys, self._pages(offsets, lengths)) == [PageStatus.OK] * len(keys)

    def get_within_a_put(self, key: str, size_bytes: int, timeout_s: float) -> bool:
        """Whether some get of a small page began and ended while one put of large pages ran."""
        large = self._pages(np.zeros((16, 1), np.int64), (size_bytes,))
        small = self._pages(np.zeros((1, 1), np.int64), (64,))
        self.store.put([key], small)
        puts = list[tuple[float, float]]()
        over = threading.Event()

        def put_and_put_again() -> None:
            for number in itertools.count():
                begin_s = time.monotonic()
                self.store.put([f"{key}:{number}:{page}" for page in range(16)], large)
                puts.append((begin_s, time.monotonic()))
                if over.is_set():
                    return

        thread = threading.Thread(target=put_and_put_again)
        thread.start()
        deadline_s = time.monotonic() + timeout_s
        found, gets = False, list[tuple[float, float]]()
        while not found and time.monotonic() < deadline_s:
            begin_s = time.monotonic()
            self.store.get([key], small)
            gets.append((begin_s, time.monotonic()))
            found = any(p[0] < g[0] and g[1] < p[1] for p in puts[-9:] for g in gets[-999:])
        over.set()
        thread.join()
        return found

    def close_behind_its_back(self) -> None:
        assert self.store._native.close() == 0

    def _pages(self, offsets: Any, lengths: tuple[int, ...]) -> PageBatch:
        moved = np.where(offsets == NULL_OFFSET, 0, offsets + self.arena.address)
        return PageBatch(moved, tuple(lengths))


def _arguments(error: Exception) -> tuple[Any, ...]:
    if isinstance(error, StoreUnavailable):
        return (error.operation, str(error).partition(": ")[2], error.code)
    return (error.reasons,) if isinstance(error, ConfigError) else (str(error),)


def main() -> None:
    pipe, lock = Connection(int(sys.argv[1])), threading.Lock()
    worker = _Worker(*json.loads(sys.argv[2]))

    def answer(number: int, method: str, arguments: tuple[Any, ...]) -> None:
        reply: tuple[int, str | None, Any]
        try:
            reply = (number, None, worker.run(method, *arguments))
        except ERRORS as error:
            reply = (number, type(error).__name__, _arguments(error))
        with lock:
            pipe.send(reply)

    with ThreadPoolExecutor(16) as pool:
        while True:
            try:
                number, method, arguments = pipe.recv()
            except EOFError:  # the tests have ended
                os._exit(1)
            if method == "exit":
                return
            pool.submit(answer, number, method, arguments)


if __name__ == "__main__":
    main()
