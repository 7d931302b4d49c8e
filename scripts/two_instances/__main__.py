# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""The demonstration: two real SGLang servers share one pool through one flag."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path

from rich.console import Console
from sglang_cpu.models import KINDS, make_model

from two_instances import report
from two_instances.cluster import Cluster, LocalPool, MemcachePool, Pool
from two_instances.run import Result, Run, make_prompts

ROOT = Path(__file__).resolve().parents[2]


def parse() -> argparse.Namespace:
    """Options of scripts/demo."""
    parser = argparse.ArgumentParser(
        prog="scripts/demo",
        description="Start a pool and two real SGLang servers that share it through "
        "--enable-hierarchical-cache-direct, send long prompts to A, then the same to B, and "
        "compare every answer with a server that caches nothing. Exits 0 only if all answers "
        "agree and B really loaded from the pool. `scripts/demo --pd` shows prefill and decode "
        "nodes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--store", choices=("memcache", "local"), default="memcache", help="what the pool is")
    add(
        "--protocol",
        choices=("host_shm", "host_tcp", "device_sdma"),
        default="host_shm",
        help="MemCache data path; all of them on the driver emulation, none is an NPU result",
    )
    add("--model", choices=KINDS, default="gqa", help="architecture, made on the spot")
    add("--tp", type=int, default=1, help="tensor-parallel ranks of each server")
    add("--size", choices=("tiny", "demo"), default="demo", help="size of the model")
    add("--prompts", type=int, default=4, help="number of prompts")
    add("--prompt-tokens", type=int, default=3500, help="tokens of each prompt")
    add("--page-size", type=int, default=64, help="SGLang's --page-size")
    add("--restart", action="store_true", help="then restart both servers and ask again")
    add("--out", type=Path, default=ROOT / ".demo" / "result", help="where the files go")
    return parser.parse_args()


def _show(result: Result, pool: str, out: Path, console: Console) -> None:
    """Table, verdict and files."""
    report.print_table(result, console)
    report.print_verdict(result, len(result.answers), console)
    report.write_json(result, out / "result.json")
    report.write_picture(result, out / "result.png", f"Two SGLang servers, one {pool}")


def main() -> int:
    """Run it; 0 when everything was proved, 1 when not, 130 on Ctrl-C."""
    options = parse()
    console = Console()
    begin_s = time.monotonic()

    def progress(line: str) -> None:
        console.print(
            f"[dim]{time.monotonic() - begin_s:6.1f} s[/]  {line}", highlight=False, soft_wrap=True
        )

    model = make_model(
        ROOT / ".demo" / "models" / f"{options.model}-{options.size}",
        options.model,
        size=options.size,
    )
    pool: Pool = LocalPool() if options.store == "local" else MemcachePool(options.protocol)
    options.out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(options.out / "logs", ignore_errors=True)
    prompts = make_prompts(options.prompts, options.prompt_tokens)
    try:
        with Cluster(
            pool,
            model,
            ["--page-size", str(options.page_size)],
            servers=dict.fromkeys(("A", "B"), options.tp),
            log_dir=options.out / "logs",
            progress=progress,
        ) as cluster:
            run = Run(cluster, prompts, page_size=options.page_size, tick=progress)
            run.rounds()
            if options.restart:
                run.after_restart()
            result = run.judge()
            rss = {n: s.peak_rss_bytes() for n, s in cluster.servers.items()}
            result.facts["peak memory of a server"] = f"{max(rss.values()) / 2**30:.2f} GiB"
    except KeyboardInterrupt:
        console.print("interrupted; everything that was started has been stopped")
        return 130
    result.facts["pool"] = pool.name
    _show(result, pool.name, options.out, console)
    console.print(
        f"{options.out}/result.json, result.png, logs/   {time.monotonic() - begin_s:.0f} s"
    )
    return 1 if result.problems else 0


if __name__ == "__main__":
    sys.exit(main())
