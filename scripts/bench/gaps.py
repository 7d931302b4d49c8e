# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""How long a running answer waits for its next token while other requests' prefixes arrive.

Owns the measurement: one long answer streams from B; meanwhile B gets long prompts whose prefix is
in the pool, and each of them once more, when it is on the device. The second costs B the same
computing and no load, so the ratio of the gaps is what loading costs the running answer.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from sglang_cpu.client import SGLangClient
from sglang_cpu.models import KINDS, make_model
from two_instances.cluster import PATIENCE, Cluster, MemcachePool
from two_instances.run import make_prompts

ROOT = Path(__file__).resolve().parents[2]
MODES = ("sync", "lookahead")
KINDS_OF_LOAD = ("idle", "device", "pool")
# Tokens of the long answer: more than any run needs; it is ended when the prompts are through.
LONG_ANSWER_TOKENS = 12_000
IDLE_S = 3.0


@dataclass
class Gaps:
    """Seconds between tokens of the running answer, by what B was given meanwhile."""

    mode: str
    seconds: dict[str, list[float]] = field(
        default_factory=lambda: {kind: [] for kind in KINDS_OF_LOAD}
    )

    def quantile_ms(self, kind: str, share: float) -> float:
        """Of the gaps of one kind, by linear interpolation."""
        ordered = sorted(self.seconds[kind])
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return 1e3 * (ordered[low] + (place - low) * (ordered[high] - ordered[low]))

    def ratio(self, share: float) -> float:
        """Gaps while loads land ÷ gaps while the same prompts are device hits."""
        return self.quantile_ms("pool", share) / self.quantile_ms("device", share)


class _Answer:
    """A long answer streaming in the background, and when each of its tokens came."""

    class _Enough(Exception):
        """Ends the stream."""

    def __init__(self, client: SGLangClient) -> None:
        self.times_s: list[float] = []
        self._client = client
        self._stop = threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._stream, name="long-answer")

    def _stream(self) -> None:
        try:
            self._client.generate([5] * 16, LONG_ANSWER_TOKENS, on_part=self._on_part)
        except self._Enough:
            pass
        except Exception as error:  # noqa: BLE001  shown by the thread that waits
            self._failure = error

    def _on_part(self, output_ids: list[int]) -> None:
        self.times_s.append(time.perf_counter())
        if self._stop.is_set():
            raise self._Enough

    def __enter__(self) -> _Answer:
        self._thread.start()
        while len(self.times_s) < 20 and self._thread.is_alive():
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def gaps_s(self, begin_s: float, end_s: float) -> list[float]:
        """Gaps that end in this stretch of time."""
        return [b - a for a, b in itertools.pairwise(self.times_s) if begin_s <= b <= end_s]


def measure(cluster: Cluster, mode: str, prompts: Sequence[Sequence[int]], say: Any) -> Gaps:
    """Fill the pool through A, then disturb B's running answer.

    Raises:
        RuntimeError: a prompt was not the hit it should be; its gaps would prove nothing.
    """
    a, b = cluster.servers["A"], cluster.servers["B"]
    for number, prompt in enumerate(prompts, 1):
        a.generate(prompt, 1)
        say(f"{mode}: A computes prompt {number} of {len(prompts)}")
    cluster.pool.wait_stored(sum(len(prompt) // 64 for prompt in prompts), 60)
    gaps = Gaps(mode)
    with _Answer(b) as answer:
        begin_s = time.perf_counter()
        time.sleep(IDLE_S)
        gaps.seconds["idle"] += answer.gaps_s(begin_s, time.perf_counter())
        for number, prompt in enumerate(prompts, 1):
            for kind, tier in (("pool", "storage"), ("device", "device")):
                begin_s = time.perf_counter()
                got = b.generate(prompt, 1, return_cached_tokens_details=True)
                time.sleep(0.05)  # the token that waited comes after the other's answer
                gaps.seconds[kind] += answer.gaps_s(begin_s, time.perf_counter())
                if got.cached_tokens_details.get(tier, 0) < len(prompt) - 2 * 64:
                    raise RuntimeError(f"prompt {number} is no {kind} hit: {got}")
            say(f"{mode}: prompt {number} of {len(prompts)} to B, from the pool and the device")
    return gaps


def print_table(results: Sequence[Gaps], console: Console) -> None:
    """Median and tail of each kind, and the ratio."""
    table = Table(title="Gap between tokens of a running answer, ms (p50 / p99)")
    for name in ("load_mode", "alone", "with device hits", "with pool hits", "pool ÷ device"):
        table.add_column(name, justify="right")
    for gaps in results:
        cells = [
            f"{gaps.quantile_ms(kind, 0.5):.1f} / {gaps.quantile_ms(kind, 0.99):.1f}"
            for kind in KINDS_OF_LOAD
        ]
        table.add_row(gaps.mode, *cells, f"{gaps.ratio(0.5):.2f} / {gaps.ratio(0.99):.2f}")
    console.print(table)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Options of scripts/bench/gaps."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench/gaps",
        description="Gap between the tokens of a running answer while long prefixes are loaded "
        "from the pool, against the same prompts as device hits, per load_mode.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--modes", nargs="+", choices=MODES, default=list(MODES), help="load_mode", metavar="MODE")
    add("--model", choices=KINDS, default="gqa", help="architecture, made on the spot")
    add("--size", choices=("tiny", "demo"), default="demo", help="size of the model")
    add("--prompts", type=int, default=16, help="long prompts given to B")
    add("--prompt-tokens", type=int, default=3500, help="tokens of each")
    add("--out", type=Path, default=ROOT / ".demo" / "bench", help="where the files go")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; 130 on Ctrl-C."""
    options = parse(argv)
    console = Console()
    options.out.mkdir(parents=True, exist_ok=True)
    folder = ROOT / ".demo" / "models" / f"{options.model}-{options.size}"
    model = make_model(folder, options.model, size=options.size)
    prompts = make_prompts(options.prompts, options.prompt_tokens)
    results = []
    try:
        for mode in options.modes:
            with Cluster(
                MemcachePool(member_size="4GB"),
                model,
                ["--page-size", "64"],
                direct={"load_mode": mode, **PATIENCE},
                reference=False,
                log_dir=options.out / f"gaps-{mode}",
                progress=console.print,
            ) as cluster:
                results.append(measure(cluster, mode, prompts, console.print))
    except KeyboardInterrupt:
        console.print("interrupted")
        return 130
    with (options.out / "gaps.jsonl").open("w", encoding="utf-8") as out:
        for gaps in results:
            out.write(json.dumps({"mode": gaps.mode, "seconds": gaps.seconds}) + "\n")
    print_table(results, console)
    longest = {g.mode: f"{1e3 * max(g.seconds['pool']):.0f}" for g in results}
    medians = statistics.median(len(g.seconds["pool"]) for g in results)
    console.print(f"longest gap with pool hits, ms: {longest}; about {medians:.0f} gaps each")
    return 0


if __name__ == "__main__":
    sys.exit(main())
