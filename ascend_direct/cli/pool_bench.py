# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""`ascend-direct pool bench`: how fast this machine writes to the pool and reads from it.

Owns the load, its bounds, and that nothing of it stays. It moves pages as servers do (several spans
each, several pages a call), under a namespace of its own. scripts/bench/transfer compares our loads
with the bare call; this asks one pool, as it is, and works where the package alone is installed.
"""

from __future__ import annotations

import json
import secrets
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from ascend_direct.cli.conventions import (
    EXIT_OK,
    Config,
    complain,
    end,
    size_bytes,
    take_stdout,
)
from ascend_direct.cli.pool_clear import client_store
from ascend_direct.config import GIB, MIB
from ascend_direct.device import Device
from ascend_direct.errors import ConfigError, StoreError, StoreUnavailable
from ascend_direct.page_key import KEY_VERSION
from ascend_direct.page_layout import Region
from ascend_direct.store.base import PageBatch, PageStatus, PageStore, StoreContext
from ascend_direct.store.memcache_host import is_emulated

EXIT_WRONG = 1
# A call under way when the time is over, or after Ctrl-C, is waited for this long.
PATIENCE_S = 10.0

Seconds = Annotated[float, typer.Option(min=0.1, max=600, help="Time to write, and to read.")]
Size = Annotated[str, typer.Option(help="Room to take in the pool at most; it is given back.")]
PageSize = Annotated[str, typer.Option(help="Bytes of a page: those in a server's start line.")]
Spans = Annotated[int, typer.Option(min=1, max=4096, help="Pieces a page lies in: the same line.")]
Pages = Annotated[int, typer.Option(min=1, max=4096, help="Pages of one call.")]
InFlight = Annotated[int, typer.Option(min=1, max=64, help="Calls at a time.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object.")]


@dataclass
class Way:
    """Calls of one direction; `wall_s` is from the start of the first to the end of the last."""

    call_bytes: int
    times_s: list[float] = field(default_factory=list)
    wall_s: float = 0.0
    refused_pages: int = 0
    why: str = ""

    def told(self) -> dict[str, Any]:
        """For JSON; rates count calls that moved all their pages."""
        calls = len(self.times_s)
        told = {
            "calls": calls,
            "bytes": calls * self.call_bytes,
            "refused_pages": self.refused_pages,
        }
        if not calls:
            return {**told, "why": self.why}
        cuts = statistics.quantiles([*self.times_s, *self.times_s], n=100, method="inclusive")
        rate = round(told["bytes"] / self.wall_s / GIB, 3)
        times = {f"p{p}_ms": round(1e3 * cuts[p - 1], 3) for p in (50, 99)}
        return {**told, "gib_per_s": rate, **times, "why": self.why}


def bench(
    config: Config = None,
    seconds: Seconds = 3.0,
    size: Size = "512MB",
    page_size: PageSize = "2MB",
    spans: Spans = 64,
    pages: Pages = 8,
    in_flight: InFlight = 1,
    as_json: AsJson = False,
) -> None:
    """Write pages to the pool for some seconds, read them back, compare them, remove them.

    Joins the pool as a client and takes at most --size of its room; a pool that is nearly full
    evicts servers' pages for it. The defaults are pages of about a 30B model on 8 ranks, 16 MB a
    call. Memory of this host is used, also where servers have NPUs. Ctrl-C ends it early, with the
    figures so far. Its pages are removed at the end; from MemCache only with memcache.metrics_url.

    Exit codes: 0 measured; 1 other bytes came back, or nothing could be moved; 2 bad configuration;
    3 the pool does not answer; 130 Ctrl-C.
    """
    joined, code = False, EXIT_OK
    try:
        store, name = client_store(config)
        trial = _Trial(store, page_size, spans, pages, in_flight, size)
        joined = store.name == "memcache"
        out = take_stdout() if joined else sys.stdout
        found = {"pool": name, **trial.run(seconds)}
        if not joined:  # MemCache's client takes its time to leave; the process ends instead
            store.close()
        print(json.dumps(found) if as_json else _text(found), file=out, flush=True)
        moved = all(found[way]["calls"] for way in ("put", "get"))
        code = EXIT_OK if found["same_bytes"] and moved else EXIT_WRONG
        code = 130 if found["interrupted"] else code
    except (ConfigError, StoreUnavailable) as error:
        code = complain(error)
    if joined:
        end(code)
    raise typer.Exit(code)


class _Lane:
    """Memory of one call at a time, split into spans.

    All lanes send the same bytes, but that each page begins with its call's number: what one lane
    has put another can check.
    """

    def __init__(self, random: np.ndarray[Any, Any], spans: int) -> None:
        self.sent = np.repeat(random[None], spans, axis=0)
        self.got = np.zeros_like(self.sent)
        self._lengths = (random.shape[1],) * spans

    def batch(self, memory: np.ndarray[Any, Any]) -> PageBatch:
        spans, pages, span_bytes = memory.shape
        starts = np.arange(spans) * (pages * span_bytes) + np.arange(pages)[:, None] * span_bytes
        return PageBatch(starts.astype(np.int64) + memory.ctypes.data, self._lengths)

    def stamp(self, number: int) -> None:
        self.sent[0, :, :8] = np.frombuffer(number.to_bytes(8, "little"), np.uint8)

    @property
    def regions(self) -> tuple[Region, ...]:
        return tuple(Region(memory.ctypes.data, memory.nbytes) for memory in (self.sent, self.got))


class _Trial:
    """One run. Numbers of calls are their keys' names, so that a read knows what it should find."""

    def __init__(
        self, store: PageStore, page_size: str, spans: int, pages: int, in_flight: int, size: str
    ) -> None:
        page_bytes, room_bytes = size_bytes("--page-size", page_size), size_bytes("--size", size)
        self._store = store
        self._span_bytes = page_bytes // spans
        self._call_bytes = self._span_bytes * spans * pages
        self._most_calls = room_bytes // max(1, self._call_bytes)
        self._pages = pages
        problems = []
        if self._span_bytes < 8 or page_bytes % spans:
            problems.append(f"--page-size {page_size} does not divide into {spans} --spans.")
        elif self._most_calls < in_flight:
            need = self._call_bytes * in_flight // MIB + 1
            problems.append(f"--size {size} holds less than the calls at a time: use {need}MB.")
        if problems:
            raise ConfigError(problems)
        self.namespace = secrets.token_hex(8)
        shape = (pages, self._span_bytes)
        random = np.frombuffer(secrets.token_bytes(pages * self._span_bytes), np.uint8)
        self._lanes = [_Lane(random.reshape(shape), spans) for _ in range(in_flight)]
        self._same_bytes = True
        self._stored: list[int] = []

    def run(self, seconds: float) -> dict[str, Any]:
        """Put, get, clear.

        Raises:
            ConfigError: the store cannot be used here.
            StoreUnavailable: it could not be opened.
        """
        memory = Device.of("cpu").memory
        regions = tuple(region for lane in self._lanes for region in lane.regions)
        page_bytes = self._call_bytes // self._pages
        self._store.open(StoreContext(memory=memory, page_bytes=page_bytes, regions=regions))
        clear = f"ascend-direct pool clear --namespace {self.namespace} --config <the same>"
        put, get, interrupted = Way(self._call_bytes), Way(self._call_bytes), False
        try:
            typer.echo(f"pages under {self.namespace}; if this is killed: {clear}", err=True)
            self._drive(put, seconds, iter(range(self._most_calls)), self._put)
            self._drive(get, seconds, self._again(), self._get)
        except KeyboardInterrupt:
            interrupted = True
        removed, left = self._remove()
        return {
            "emulated": is_emulated(),
            "page_bytes": page_bytes,
            "pages_per_call": self._pages,
            "in_flight": len(self._lanes),
            "put": put.told(),
            "get": get.told(),
            "same_bytes": self._same_bytes,
            "interrupted": interrupted,
            "removed": removed,
            "left": left,
        }

    def _again(self) -> Iterator[int]:
        """Calls that were stored, over and over, the latest first: a pool evicts the oldest."""
        while self._stored:
            yield from self._stored[::-1]

    def _drive(
        self,
        way: Way,
        seconds: float,
        numbers: Iterator[int],
        call: Callable[[Way, _Lane, int], None],
    ) -> None:
        """Keep every lane busy until the time is over, the numbers are, or a call has failed."""
        begin_s = time.perf_counter()
        free, running = list(self._lanes), dict[Future[None], _Lane]()
        threads = ThreadPoolExecutor(len(self._lanes), "bench")
        try:
            while True:
                late = time.perf_counter() - begin_s > seconds or bool(way.why)
                number = None if late or not free else next(numbers, None)
                if number is not None:
                    lane = free.pop()
                    running[threads.submit(call, way, lane, number)] = lane
                    continue
                if not running:
                    break
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                free += [running.pop(future) for future in done]
        finally:
            # Also on Ctrl-C: until a call has returned it uses its lane's memory.
            wait(running, timeout=PATIENCE_S)
            threads.shutdown(wait=False, cancel_futures=True)
            way.wall_s = time.perf_counter() - begin_s

    def _put(self, way: Way, lane: _Lane, number: int) -> None:
        lane.stamp(number)
        if self._call(way, self._store.put, number, lane.batch(lane.sent)):
            self._stored.append(number)

    def _get(self, way: Way, lane: _Lane, number: int) -> None:
        lane.got[0, :, :8] = 0xFF
        if self._call(way, self._store.get, number, lane.batch(lane.got)):
            lane.stamp(number)
            self._same_bytes &= bool(np.array_equal(lane.got, lane.sent))
        elif number in self._stored:  # evicted: a pool with less room than --size
            self._stored.remove(number)

    def _call(
        self,
        way: Way,
        move: Callable[[list[str], PageBatch], list[PageStatus]],
        number: int,
        batch: PageBatch,
    ) -> bool:
        keys = [
            f"{KEY_VERSION}:{self.namespace}:-:{number:032x}{i:032x}" for i in range(len(batch))
        ]
        begin_s = time.perf_counter()
        try:
            statuses = move(keys, batch)
        except StoreError as error:
            way.why = f"{error}."
            return False
        took_s = time.perf_counter() - begin_s
        refused = [status for status in statuses if status is not PageStatus.OK]
        if refused:
            way.refused_pages += len(refused)
            if set(refused) != {PageStatus.MISSING}:
                way.why = f"the pool answered {refused[0].name}."
            return False
        way.times_s.append(took_s)
        return True

    def _remove(self) -> tuple[int | None, str]:
        """How many objects were removed, and what to do about those that were not."""
        try:
            return self._store.clear(f"{KEY_VERSION}:{self.namespace}:"), ""
        except (ConfigError, StoreError) as error:
            why = error.reasons[0] if isinstance(error, ConfigError) else f"{error}."
            return None, f"{len(self._stored) * self._pages} pages stay until evicted: {why}"


def _text(found: dict[str, Any]) -> str:
    where = ", on the driver emulation: no figure for Ascend" if found["emulated"] else ""
    title = (
        f"{found['pool']}{where}: {found['pages_per_call']} pages of {found['page_bytes']} bytes a "
        f"call, {found['in_flight']} at a time"
    )
    table = Table("", "GiB/s", "calls", "p50 ms", "p99 ms", "refused", "ended early")
    for way in ("put", "get"):
        row = found[way]
        cells = [str(row.get(name, "-")) for name in ("gib_per_s", "calls", "p50_ms", "p99_ms")]
        table.add_row(way, *cells, str(row["refused_pages"]), row["why"])
    console = Console(highlight=False)
    with console.capture() as capture:
        console.print(title, soft_wrap=True)
        console.print(table)
        if not found["same_bytes"]:
            console.print("Other bytes came back than were stored: do not use this pool.")
        if found["left"]:
            console.print(found["left"])
    return capture.get().rstrip()
