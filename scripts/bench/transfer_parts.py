# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""The parts of scripts/bench/transfer: pools, worker processes, and the order in which they work.

Owns no figure: each part appends lines of JSON to the file that is reported on. What is timed is
the workers' (transfer_worker, keys_worker, thread_worker).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from two_instances.cluster import MemcachePool

from ascend_direct.config import DirectConfig
from ascend_direct.store.meta_service import MetaServiceHttp
from ascend_direct.store.meta_service_stats import segments
from bench import keys_worker, transfer_worker
from bench.shapes import CURVE, SHAPES

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20
# MemCache gives an object a multiple of this.
GRAIN_BYTES = 4096
SPREAD_OBJECTS, SPREAD_BYTES = 256, MIB
HTTP_TIMEOUT_S = 5.0
LOG_LINES = 20

Say = Callable[[str], None]


class WorkerFailed(RuntimeError):
    """A worker ended early; the message ends with its log."""


class Run:
    """One run: where lines go, and how workers are started. Its pools end with it."""

    def __init__(self, options: argparse.Namespace, say: Say) -> None:
        self._options = options
        self._say = say
        self._out: Path = options.out
        self.path = self._out / "transfer.jsonl"
        self._undo = ExitStack()
        self._common_pool: MemcachePool | None = None

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def add(self, line: dict[str, Any]) -> None:
        """Append a line to the file."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    # ---- moves and the curve ---------------------------------------------------------------

    def moves(self) -> None:
        """Pages of real models' shapes."""
        for name in self._options.shapes:
            self._move(name, self._options.pages, packed=name in self._options.packed)

    def curve(self) -> None:
        """From one small page to thousands."""
        self._move(CURVE, self._options.curve)

    def _move(self, name: str, pages: list[int], *, packed: bool = False) -> None:
        options, pool = self._options, self._common()
        most = options.max_mib * MIB
        fitting = [n for n in pages if name == CURVE or n * SHAPES[name].page_bytes <= most]
        self._say(f"{name}: {fitting} pages")
        default = DirectConfig.load({}, {}).batch_bytes
        own = options.batch_mib * MIB if options.batch_mib else default
        task = transfer_worker.Task(
            pool.options(),
            name,
            fitting,
            options.rounds,
            options.in_flight if name != CURVE else [],
            own,
            [size * MIB for size in options.other_batches_mib if size * MIB != own],
            packed,
            options.one_core,
        )
        self._work("bench.transfer_worker", asdict(task), pool)

    # ---- lookups ---------------------------------------------------------------------------

    def lookups(self) -> None:
        """Pools of different size asked in turns: what slows the machine slows all of them."""
        with ExitStack() as undo:
            asked = {stored: self._filled(stored, undo) for stored in self._options.stored}
            answers: dict[tuple[int, int], list[dict[str, float]]] = {}
            for number in range(1 + self._options.lookup_rounds):
                for stored, ask in asked.items():
                    for count in self._options.asked:
                        answer = ask({"asked": count})
                        if number:  # the first question opens connections
                            answers.setdefault((stored, count), []).append(answer)
            for (stored, count), rounds in answers.items():
                seconds = {way: [r[way] for r in rounds] for way in rounds[0]}
                self.add({"kind": "lookup", "stored": stored, "asked": count, "seconds": seconds})
            pages = DirectConfig.load({}, {}).belief_pages
            question = {"beliefs": pages, "asked": self._options.asked}
            self.add({"kind": "beliefs", "pages": pages, **next(iter(asked.values()))(question)})

    def _filled(self, stored: int, undo: ExitStack) -> Callable[[dict[str, Any]], dict[str, float]]:
        self._say(f"lookups: storing {stored:,} keys")
        size = 2 * stored * GRAIN_BYTES // (1 << 30) + 1
        pool = undo.enter_context(self._pool(f"{size}GB"))
        ask, filled = self._keys(pool, stored, 64, undo)
        self.add({"kind": "fill", "stored": stored, **filled})
        return ask

    def _keys(
        self, pool: MemcachePool, stored: int, object_bytes: int, undo: ExitStack
    ) -> tuple[Callable[[dict[str, Any]], dict[str, float]], dict[str, float]]:
        task = keys_worker.Task(pool.options(), stored, object_bytes)
        log_path = self._out / f"keys-{stored}.log"
        log = undo.enter_context(log_path.open("wb"))
        worker = self._start("bench.keys_worker", [json.dumps(asdict(task))], pool, log, pipes=True)
        undo.callback(_end, worker)

        def answer() -> dict[str, float]:
            assert worker.stdout is not None
            line = worker.stdout.readline()
            if not line:
                raise WorkerFailed(_tail(log_path))
            found: dict[str, float] = json.loads(line)
            return found

        def ask(question: dict[str, Any]) -> dict[str, float]:
            assert worker.stdin is not None
            worker.stdin.write(json.dumps(question).encode() + b"\n")
            worker.stdin.flush()
            return answer()

        return ask, answer()

    # ---- members ---------------------------------------------------------------------------

    def members(self) -> None:
        """Where the pages of one put go, in a pool of two members."""
        self._say("members: one put into a pool of two")
        with ExitStack() as undo:
            pool = undo.enter_context(self._pool("1GB", members=2))
            self._keys(pool, SPREAD_OBJECTS, SPREAD_BYTES, undo)
            http = MetaServiceHttp(pool.meta.metrics_url, HTTP_TIMEOUT_S)
            undo.callback(http.close)
            used = [segment.used_bytes for segment in segments(http)]
            self.add({"kind": "members", "objects": SPREAD_OBJECTS, "used_bytes": used})

    # ---- the scheduler's thread ------------------------------------------------------------

    def thread(self) -> None:
        """What the cache takes from SGLang's scheduler thread."""
        self._say(f"scheduler thread: {self._options.thread_pages} pages")
        pool = self._common()
        # thread_worker imports SGLang, which this process can do without.
        task = {"pages": self._options.thread_pages, "rounds": self._options.rounds}
        self._work("bench.thread_worker", {"config": pool.options(), **task}, pool)

    # ---- processes -------------------------------------------------------------------------

    def _common(self) -> MemcachePool:
        """The pool of parts that leave nothing in it: to start and end one takes ten seconds."""
        if self._common_pool is None:
            self._common_pool = self._undo.enter_context(self._pool("4GB"))
        return self._common_pool

    @contextmanager
    def _pool(self, member_size: str, members: int = 1) -> Iterator[MemcachePool]:
        pool = MemcachePool(member_size=member_size, members=members)
        try:
            pool.start()
            yield pool
        finally:
            pool.stop()

    def _work(self, module: str, task: dict[str, Any], pool: MemcachePool) -> None:
        """Run a worker that appends its own lines."""
        log_path = self._out / f"{module.split('.')[-1]}-{task.get('shape', 'all')}.log"
        with log_path.open("wb") as log:
            worker = self._start(module, [json.dumps(task), str(self.path)], pool, log)
            try:
                code = worker.wait()
            finally:
                _end(worker)
        if code:
            raise WorkerFailed(f"{module} ended with {code}:\n{_tail(log_path)}")

    def _start(
        self,
        module: str,
        arguments: list[str],
        pool: MemcachePool,
        log: BinaryIO,
        *,
        pipes: bool = False,
    ) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE if pipes else subprocess.DEVNULL,
            stdout=subprocess.PIPE if pipes else log,
            stderr=log,
            env={**os.environ, **pool.environment(), "PYTHONPATH": str(ROOT / "scripts")},
        )


def _end(worker: subprocess.Popen[bytes]) -> None:
    """A worker ends when its standard input does; one that does not is ended."""
    for pipe in (worker.stdin, worker.stdout):
        if pipe is not None:
            pipe.close()
    try:
        worker.wait(30 if worker.stdin is not None else 1)
    except subprocess.TimeoutExpired:
        worker.kill()
        worker.wait()


def _tail(log_path: Path) -> str:
    return "\n".join(log_path.read_text(errors="replace").splitlines()[-LOG_LINES:])
