# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""scripts/chaos: a long run by hand."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from sglang_cpu.models import make_model

from . import pool_stopped, report, scenarios
from .events import Pace
from .run import Plan

ROOT = Path(__file__).resolve().parents[2]
TRACKS = ("store", "requests", "pool", "server")
# 60 prompts of 700 tokens on average: nearly twice what the pool holds.
FAMILIES = (12, 5)
CLIENTS = 5
REST_EVERY_S = 300.0
DISK_SHARE = 0.06
# Folders of a run; those of the run before are removed.
PARTS = ("memcache", "disk", "logs")

DESCRIPTION = """\
Hurt a MemCache pool and two real SGLang servers on it while clients ask, and check that every
answer has the tokens of a server that caches nothing, that no request fails but those of a server
that was killed, that no page, pin, thread or descriptor leaks, and that the schedulers never stand
still for longer than the configured deadlines.

What happens, at random and side by side:
  store     latency, hangs, errors, broken contracts and torn pages at the store boundary
  requests  aborts while queued, in prefill, in decode; clients that leave; flushes in flight
  pool      kill -9 and SIGSTOP (at most 20 s) of MetaService and of members
  server    kill -9 in the middle of a put or a get, then a restart
At the end a shorter round with the local store on a disk that is full.
The same seed gives the same events; the list is in the report. Ctrl-C ends a run in order, with a
report of what was done. Everything runs on the CPU and on the driver emulation."""
EPILOG = """\
exit codes: 0 nothing found; 1 something is wrong (see PROBLEMS in report.md); 130 Ctrl-C

examples:
  scripts/chaos --minutes 30 --seed 7 --out .chaos     the long run: about 1,000 events
  scripts/chaos --minutes 3                            a look
  scripts/chaos --minutes 10 --direct '{"load_mode": "lookahead", "verify": "all"}'
  scripts/chaos --pool-stopped --requests 200          what a stopped pool costs in TTFT"""


def parse() -> argparse.Namespace:
    """Options of scripts/chaos."""
    parser = argparse.ArgumentParser(
        prog="scripts/chaos",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--minutes", type=float, default=30.0, help="how long events happen (default 30)")
    add("--seed", type=int, default=1, help="of events, prompts and clients (default 1)")
    add("--out", type=Path, default=ROOT / ".chaos", help="report and logs (default .chaos)")
    add("--no-disk", action="store_true", help="leave the round with a full disk out")
    add("--pool-stopped", action="store_true", help="measure TTFT while the pool stands still")
    add("--requests", type=int, default=200, help="with --pool-stopped: per server (default 200)")
    add("--how", choices=("stop", "kill"), default="stop", help="with --pool-stopped: the signal")
    add(
        "--direct",
        type=json.loads,
        default={},
        help="options of the cache on the servers, as a JSON object, on top of the run's own",
    )
    options = parser.parse_args()
    options.out = options.out.absolute()
    if options.minutes <= 0 or options.requests < 10:
        parser.error("--minutes must be above 0, --requests at least 10")
    return options


def main() -> int:
    """Run it; the exit code is in `--help`."""
    options, console, begin_s = parse(), Console(), time.monotonic()

    def say(line: str) -> None:
        console.print(
            f"[dim]{time.monotonic() - begin_s:6.0f} s[/]  {line}", highlight=False, soft_wrap=True
        )

    for part in PARTS:
        shutil.rmtree(options.out / part, ignore_errors=True)
    options.out.mkdir(parents=True, exist_ok=True)
    model = make_model(options.out / "model", "gqa")
    result: dict[str, Any] = {"command": f"scripts/chaos {' '.join(sys.argv[1:])}"}
    try:
        if options.pool_stopped:
            result |= pool_stopped.measure(
                model, options.out, options.requests, options.how, options.seed, say
            )
        else:
            _chaos(result, options, model, say)
    except KeyboardInterrupt:
        say("interrupted before there was anything to report; everything has been stopped")
        return 130
    report.write(options.out, result)
    console.print(report.markdown(result), markup=False, highlight=False)
    say(f"{options.out}/report.md, report.json, logs")
    return 130 if result["interrupted"] else int(bool(result["problems"]))


def _chaos(
    result: dict[str, Any], options: argparse.Namespace, model: Path, say: scenarios.Say
) -> None:
    """Both worlds; what the first found is on the disk before the second starts."""
    length_s = options.minutes * 60
    plan = Plan(
        options.seed, length_s, Pace(), TRACKS, CLIENTS, REST_EVERY_S, direct=options.direct
    )
    found, prompts = scenarios.memcache(plan, FAMILIES, model, options.out / "memcache", say)
    result |= found
    if options.no_disk or result["interrupted"]:
        return
    report.write(options.out, result)
    say("the local store on a full disk")
    plan = replace(plan, length_s=length_s * DISK_SHARE)
    disk = scenarios.full_disk(plan, prompts, model, options.out / "disk", say)
    result["problems"] += [f"full disk: {problem}" for problem in disk["problems"]]
    result["interrupted"] |= disk["interrupted"]
    result["full_disk"] = {n: v for n, v in disk.items() if n not in ("problems", "schedule")}


if __name__ == "__main__":
    sys.exit(main())
