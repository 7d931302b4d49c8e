# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""What the option `verify` costs a store: puts and gets with digests for none, some and all pages.

Owns the measurement of one store; what digests are is store/verified's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from two_instances.cluster import LocalPool, MemcachePool

from ascend_direct.config import DirectConfig
from ascend_direct.store.base import PageBatch, PageStatus, PageStore, StoreContext
from ascend_direct.store.choice import choose_store
from ascend_direct.store.verified import VerifiedStore
from bench.shapes import SHAPES, Pool

MIB = 2**20
MODES = ("off", "sample", "all")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Options of the command."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench/verify_cost",
        description="Measure what the option verify costs: pages are put and got with verify off, "
        "sample and all, in turns, and compared with what was put. On the driver emulation the "
        "figures say what it adds on this CPU, never how fast an NPU is.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--store", choices=("memcache", "local"), default="memcache", help="kind of pool")
    add("--shape", choices=SHAPES, default="qwen2.5-0.5b", help="model whose pages are moved")
    add("--pages", type=int, default=32, help="of one call")
    add("--rounds", type=int, default=15, help="repetitions; medians are shown")
    add("--worker", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def measured(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Median seconds by mode and operation; in the process that joins the pool."""
    inner = choose_store(DirectConfig.load(options.worker, environ={}))
    inner.open(StoreContext())
    stores: dict[str, PageStore] = {"off": inner}
    stores |= {mode: VerifiedStore(inner, mode, _found) for mode in ("sample", "all")}
    pool = Pool(SHAPES[options.shape], options.pages)
    pool.fill(np.random.default_rng(1))
    numbers = np.arange(1, options.pages + 1)
    batch = PageBatch(pool.layout.addresses(numbers), pool.layout.lengths_bytes)
    expected = pool.checksum(numbers)
    times: dict[str, dict[str, list[float]]] = {m: {"put": [], "get": []} for m in MODES}
    for number in range(options.rounds + 1):
        for mode in MODES[number % 3 :] + MODES[: number % 3]:
            keys = [f"ad1:{number:08x}{MODES.index(mode):08x}:-:{page}" for page in numbers]
            for operation in ("put", "get"):
                begin_s = time.perf_counter()
                answers = getattr(stores[mode], operation)(keys, batch)
                took_s = time.perf_counter() - begin_s
                assert answers == [PageStatus.OK] * len(keys), (mode, operation, set(answers))
                if number:  # the first round touches memory for the first time
                    times[mode][operation].append(took_s)
            assert pool.checksum(numbers) == expected, "wrong bytes arrived"
            inner.clear(f"ad1:{number:08x}")
    inner.close()
    return {m: {op: statistics.median(s) for op, s in ops.items()} for m, ops in times.items()}


def _found() -> None:
    raise AssertionError("a page was found corrupt")


def in_a_pool(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Start a pool and measure in a process of its own, which the native client demands."""
    pool: Any = MemcachePool(member_size="1GB") if options.store == "memcache" else LocalPool()
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "bench.verify_cost", *sys.argv[1:]]
    with tempfile.TemporaryFile() as noise:  # what the native library prints
        try:
            pool.start()
            done = subprocess.run(
                [*command, "--worker", json.dumps(pool.options())],
                env={**os.environ, **pool.environment(), "PYTHONPATH": str(root / "scripts")},
                stdout=subprocess.PIPE,
                stderr=noise,
                check=False,
            )
            if done.returncode:
                noise.seek(0)
                sys.exit(noise.read().decode(errors="replace")[-4000:])
        finally:
            pool.stop()
    times: dict[str, dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    return times


def main() -> None:
    """Print a table; with --worker, one line of JSON."""
    options = parse()
    if options.worker:
        print(json.dumps(measured(options)), flush=True)
        return
    times = in_a_pool(options)
    shape = SHAPES[options.shape]
    size_bytes = options.pages * shape.page_bytes
    print(f"{options.store}, {options.pages} pages of {shape.page_bytes} bytes ({shape.name})")
    for operation in ("put", "get"):
        base_s = times["off"][operation]
        for mode in MODES:
            took_s = times[mode][operation]
            added_us = (took_s - base_s) / options.pages * 1e6
            print(
                f"{operation}  verify {mode:<7} {size_bytes / MIB / took_s:8.0f} MiB/s  "
                f"{took_s / base_s:5.2f} x the time  {added_us:+8.1f} us a page"
            )


if __name__ == "__main__":
    main()
