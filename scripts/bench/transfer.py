# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""What the cache adds to MemCache: to moving pages, to lookups, and to the scheduler's thread.

Owns the options and the order of parts. What a part does is transfer_parts', what comes of it
transfer_report's; times are taken in worker processes.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from bench import transfer_report
from bench.shapes import CURVE, SHAPES
from bench.transfer_parts import Run, WorkerFailed

ROOT = Path(__file__).resolve().parents[2]
FILE_WIDTH = 160
PARTS = ("moves", "curve", "thread", "lookups", "members")
MODELS = [name for name in SHAPES if name != CURVE]
DESCRIPTION = """\
Measure what the plugin adds to MemCache. On the driver emulation the figures say what one way adds
to another on the same machine, never how fast an NPU is.

parts:
  moves    pages of real models' shapes: load() and store() against one bare memcache_hybrid call
           with its arguments ready, and against a plain copy of the same fragments on one thread
  curve    the same for small pages (192 KiB in 48 fragments), from 1 to 4,096 of them
  lookups  questions to pools with 10^4, 10^5 and 10^6 keys, asked in turns; the memory of beliefs
  members  where the pages of one put go, in a pool of two members
  thread   what the cache takes from SGLang's scheduler thread: the real radix cache and controller,
           native calls subtracted; "match" is all that SGLang does in a round for one waiting
           request, "our lookup" what is ours in it"""
EPILOG = """\
Within a round each way moves the same pages once, in an order of chance; bytes are compared before
a time counts. Ratios are taken within rounds, and their median is shown: a slow second hits both.

other ways of the part moves:
  bare get, other thread   the bare call handed to a thread and waited for: what any deadline costs
  bare get xN              N bare calls at a time, each with a share of the pages (--in-flight)
  load, N MiB a call       the plugin's load with another batch_bytes (--other-batches-mib)
  load, packed             with transfer: packed, which host memory does not need (--packed)

examples:
  scripts/bench/transfer                          # all of it; 5 minutes on two quiet cores, 14 GB
  scripts/bench/transfer --parts moves --shapes deepseek-r1 --pages 8 32 --in-flight 1 2 4
  scripts/bench/transfer --parts lookups --stored 10000 100000
  scripts/bench/transfer --parts moves curve --one-core   # how much of a load is the other core
  scripts/bench/transfer --report                 # show again what --out holds

It writes transfer.jsonl (every time taken), report.md, report.png and the workers' logs to --out.
Ctrl-C reports what was measured until then."""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Options of scripts/bench/transfer."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench/transfer",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help="see above")
    add("--shapes", nargs="+", choices=MODELS, default=MODELS, metavar="NAME", help=f"of {MODELS}")
    add("--pages", nargs="+", type=int, default=[1, 8, 32], help="of one transfer (1 8 32)")
    add("--max-mib", type=int, default=512, help="leave out larger transfers (512)")
    add("--rounds", type=int, default=15, help="repetitions; medians are shown (15)")
    add("--in-flight", nargs="+", type=int, default=[1, 2, 4], help="bare gets at a time (1 2 4)")
    add("--batch-mib", type=int, default=None, help="the plugin's batch_bytes; its default")
    add(
        "--other-batches-mib",
        nargs="*",
        type=int,
        default=[16, 64, 256],
        help="also these (16 64 256)",
    )
    add("--one-core", action="store_true", help="load on the core of the caller, with its caches")
    packed = ["qwen2.5-0.5b", "deepseek-r1"]
    add("--packed", nargs="*", choices=MODELS, default=packed, help=f"also packed ({packed})")
    powers = [4**power for power in range(7)]
    add("--curve", nargs="+", type=int, default=powers, help="pages of the curve (1 4 … 4096)")
    stored = [10**4, 10**5, 10**6]
    add("--stored", nargs="+", type=int, default=stored, help="keys in pools (10^4 10^5 10^6)")
    add("--asked", nargs="+", type=int, default=[54, 1024], help="keys of a lookup (54 1024)")
    add("--lookup-rounds", type=int, default=40, help="questions of each kind (40)")
    add("--thread-pages", nargs="+", type=int, default=[54, 1024], help="of a prompt (54 1024)")
    add("--report", action="store_true", help="measure nothing, show what --out holds")
    add("--out", type=Path, default=ROOT / ".demo" / "bench", help="where the files go")
    options = parser.parse_args(argv)
    if min(options.stored) < max(options.asked):
        parser.error("--asked: a pool of --stored keys cannot be asked about more than it has")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """0: measured and reported; 1: a worker failed; 130: interrupted."""
    options = parse(argv)
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell may have started us deaf to Ctrl-C
        signal.signal(number, signal.default_int_handler)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else FILE_WIDTH)
    options.out.mkdir(parents=True, exist_ok=True)
    begin_s, code = time.monotonic(), 0

    def say(text: str) -> None:
        console.print(f"{time.monotonic() - begin_s:4.0f} s  {text}", markup=False)

    run = Run(options, say)
    try:
        if not options.report:
            with run:
                _measure(run, options)
    except KeyboardInterrupt:
        console.print("interrupted")
        code = 130
    except WorkerFailed as error:
        console.print(f"FAILED: {error}", style="red", markup=False)
        code = 1
    if run.path.exists():
        for file in transfer_report.write(run.path, options.out, console):
            console.print(str(file), soft_wrap=True)
    say("done" if not code else "ended early")
    return code


def _measure(run: Run, options: argparse.Namespace) -> None:
    """The chosen parts, in a new file."""
    run.path.unlink(missing_ok=True)
    date = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    load = [round(value, 1) for value in os.getloadavg()]
    run.add({"kind": "run", "date": date, "load": load, "rounds": options.rounds})
    for part in PARTS:
        if part in options.parts:
            getattr(run, part)()


if __name__ == "__main__":
    sys.exit(main())
