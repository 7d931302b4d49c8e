# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""How fast pages move, against the bare MemCache call and against a plain copy.

Owns the pool, the choice of cases and what is shown. Times come from `bench.transfer_worker`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from two_instances.cluster import MemcachePool

from bench.shapes import SHAPES
from bench.transfer_worker import Task

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30
Line = dict[str, Any]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Options of scripts/bench/transfer."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench/transfer",
        description="Move pages of real models' shapes through a MemCache pool: by the plugin "
        "(load, store), by the bare memcache_hybrid call, and by a plain copy of the same "
        "fragments on one thread. All of it in one run, round by round, bytes compared before a "
        "time counts. On the driver emulation the figures say what the plugin adds, never how "
        "fast an NPU is.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="models", metavar="NAME")
    add("--pages", nargs="+", type=int, default=[1, 8, 32], help="pages of one transfer")
    add("--max-bytes", type=int, default=512 * 2**20, help="leave out transfers larger than this")
    add("--rounds", type=int, default=9, help="repetitions; the median is shown")
    add("--in-flight", nargs="+", type=int, default=[1, 2], help="bare gets at a time")
    add("--batch-bytes", type=int, default=None, help="the plugin's batch_bytes; its default")
    add("--out", type=Path, default=ROOT / ".demo" / "bench", help="where the files go")
    return parser.parse_args(argv)


def measure(options: argparse.Namespace, console: Console) -> list[Line]:
    """Run a worker per shape on one pool; raises CalledProcessError with the worker's log shown."""
    from ascend_direct.config import DirectConfig

    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "transfer.jsonl"
    path.unlink(missing_ok=True)
    pool = MemcachePool(member_size="4GB")
    try:
        pool.start()
        for number, name in enumerate(options.shapes, 1):
            pages = [n for n in options.pages if n * SHAPES[name].page_bytes <= options.max_bytes]
            console.print(f"\\[{number}/{len(options.shapes)}] {name}: {pages} pages")
            batch_bytes = options.batch_bytes or DirectConfig.load({}, {}).batch_bytes
            task = Task(pool.options(), name, pages, options.rounds, options.in_flight, batch_bytes)
            _work(task, path, pool.environment(), options.out / f"{name}.log", console)
    finally:
        pool.stop()
    return [json.loads(line) for line in path.read_text().splitlines()]


def _work(
    task: Task, path: Path, environment: dict[str, str], log_path: Path, console: Console
) -> None:
    command = [sys.executable, "-m", "bench.transfer_worker", json.dumps(asdict(task)), str(path)]
    with log_path.open("wb") as log:
        done = subprocess.run(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment, "PYTHONPATH": str(ROOT / "scripts")},
            check=False,
        )
    if done.returncode:
        console.print("\n".join(log_path.read_text(errors="replace").splitlines()[-20:]))
        raise subprocess.CalledProcessError(done.returncode, command[:3])


def print_table(lines: Sequence[Line], console: Console) -> None:
    """Bandwidths, and the ratios that matter."""
    table = Table(title="GiB/s, medians; ÷ is against the bare call in the same round")
    table.add_column("page of", no_wrap=True)
    for name in ("n", "memcpy", "get", "load", "÷", "put", "store", "÷", "gets at a time"):
        table.add_column(name, justify="right")
    for line in lines:
        shape, seconds = SHAPES[line["shape"]], line["seconds"]
        size = line["pages"] * shape.page_bytes / GIB
        rate = {name: f"{size / statistics.median(took):.1f}" for name, took in seconds.items()}
        several = [n for n in seconds if n.startswith("bare get x")]
        table.add_row(
            shape.name,
            str(line["pages"]),
            *(rate[name] for name in ("memcpy", "bare get", "load")),
            f"{ratio(seconds, 'bare get', 'load'):.2f}",
            *(rate[name] for name in ("bare put", "store")),
            f"{ratio(seconds, 'bare put', 'store'):.2f}",
            ", ".join(f"{n[9:]}: {ratio(seconds, 'bare get', n):.2f}" for n in several),
        )
    console.print(table)


def ratio(seconds: dict[str, list[float]], base: str, name: str) -> float:
    """How much of `base`'s speed `name` has: the median over rounds, so that noise common to a
    round cancels."""
    return statistics.median(b / n for b, n in zip(seconds[base], seconds[name], strict=True))


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; 130 on Ctrl-C, what was measured until then is in the file."""
    options = parse(argv)
    console = Console()
    begin_s = time.monotonic()
    try:
        lines = measure(options, console)
    except KeyboardInterrupt:
        console.print("interrupted")
        return 130
    except subprocess.CalledProcessError as error:
        console.print(f"[red]a worker ended with {error.returncode}; its log is above[/]")
        return 1
    print_table(lines, console)
    console.print(f"{options.out / 'transfer.jsonl'}, {time.monotonic() - begin_s:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
