# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Two real servers answer a trace, `ascend-direct plan`'s simulation does; the two are compared.

Owns the options, the order of things and the exit code.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from sglang_cpu.models import make_model
from two_instances.cluster import PATIENCE, Cluster, MemcachePool

from ascend_direct.cli.planning import validation
from ascend_direct.cli.planning.costs import Costs
from ascend_direct.cli.planning.forecast import reusable_tokens
from ascend_direct.cli.planning.model_shape import read_shape
from ascend_direct.cli.planning.simulation import Fleet, Simulation
from ascend_direct.cli.planning.synthetic import Synthetic, generate
from ascend_direct.cli.planning.traces import Trace
from ascend_direct.config import parse_bytes
from measured_plan import compare, replay
from measured_plan.calibrate import Calibration, NotAsExpected
from measured_plan.others import Others

ROOT = Path(__file__).resolve().parents[2]
BATCH_TOKENS = 8192
# With it SGLang sends a batch's first tokens when the next one has been launched. On an NPU that is
# at once, on a CPU the next one has then been computed: a delay that only this machine has.
NO_OVERLAP = ("--disable-overlap-schedule",)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Options of scripts/plan_check."""
    parser = argparse.ArgumentParser(
        prog="scripts/plan_check",
        description="Measure what requests cost two real servers on one pool, replay a trace on "
        "them, let ascend-direct plan predict it from the same costs, and compare. Exits with 1 "
        "if a figure deviates by more than --limit-percent. MemCache runs on the driver emulation.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--size", choices=("tiny", "demo"), default="demo", help="of the model (gqa)")
    add("--requests", type=int, default=100, help="of the trace")
    add("--longest", type=int, default=3584, help="tokens of the longest prompt")
    add("--busy", type=float, default=0.4, help="share of the time that servers shall compute")
    add("--device-tokens", type=int, default=16384, help="KV of a server (--max-total-tokens)")
    add("--pool-size", default="128MB", help="memory of the pool's member")
    add("--page-size", type=int, default=64, help="tokens of a page")
    add("--lengths", type=int, nargs="+", default=[512, 1280, 2304, 3584], help="of the probes")
    add("--rounds", type=int, default=5, help="of probes and replay, in turns; medians count")
    add("--seed", type=int, default=1, help="of the trace")
    add("--one-by-one", action="store_true", help="each request after the one before: no queues")
    add("--limit-percent", type=float, default=15.0, help="largest deviation")
    add("--record", action="store_true", help="the result becomes what plan says of itself")
    add("--out", type=Path, default=ROOT / ".demo" / "plan_check", help="where the files go")
    return parser.parse_args(argv)


def workload(options: argparse.Namespace) -> Trace:
    """Conversations; nothing of an answer comes back, since no real answer is known beforehand."""
    third = options.longest // 4 // options.page_size * options.page_size
    given = Synthetic(
        requests=options.requests,
        requests_per_s=1.0,
        system_prompts=3,
        system_prompt_tokens=third,
        turns=4,
        question_tokens=options.longest // 6,
        answer_tokens=0,
        think_s=10,
        longest_prompt_tokens=options.longest,
        seed=options.seed,
    )
    return generate(given, options.page_size)


@dataclass
class Check:
    """One run on a cluster that is up."""

    options: argparse.Namespace
    pool: MemcachePool
    cluster: Cluster
    trace: Trace
    fleet: Fleet
    say: Callable[[str], None]
    others_percent: list[float] = field(default_factory=list)

    def rounds(self) -> tuple[Calibration, Trace, list[list[replay.Answered]]]:
        """Probes and replay in turns, so that a slow minute of the machine is in both."""
        options = self.options
        calibration = Calibration(self.cluster, options.page_size)
        calibration.warm_up(options.lengths[0])
        timed, answers = replay.far_apart(self.trace), []
        for number in range(options.rounds):
            self.say(f"round {number + 1} of {options.rounds}: probes")
            for length in options.lengths:
                calibration.length(length)
                self.flush()
            self.clear()
            if not number and not options.one_by_one:
                timed = replay.at_pace(self.trace, self.gap_s(calibration.costs()), options.seed)
            self.say(f"round {number + 1} of {options.rounds}: {len(timed.requests)} requests")
            others = Others()
            answers.append(self.replay(timed))
            self.others_percent.append(round(others.percent(), 1))
            self.settle()
            self.clear()
        return calibration, timed, answers

    def flush(self) -> None:
        """Empty both device caches."""
        for name in ("A", "B"):
            self.cluster.servers[name].flush()

    def clear(self) -> None:
        """Nothing of before may be found, nor make others' pages go."""
        self.flush()
        self.pool.clear()
        if left := self.pool.stored_pages():
            raise NotAsExpected(f"{left} pages are still in the pool")

    def gap_s(self, costs: Costs) -> float:
        """Mean time between requests for servers that are as busy as wanted."""
        outcome = Simulation(replay.far_apart(self.trace), self.fleet, costs).run()
        each_s = outcome.busy_s / len(self.trace.requests)
        return each_s / self.options.busy / self.fleet.instances

    def replay(self, trace: Trace) -> list[replay.Answered]:
        """The trace on the real servers."""
        servers = [self.cluster.servers[name] for name in ("A", "B")]
        if self.options.one_by_one:
            return replay.one_by_one(trace, servers, self.settle)
        return replay.open_loop(trace, servers)

    def settle(self) -> None:
        """Until the pool's pages are the same for a while."""
        held, since_s = -1, time.monotonic()
        while time.monotonic() - since_s < 0.3:
            now = self.pool.stored_pages()
            if now != held:
                held, since_s = now, time.monotonic()
            time.sleep(0.05)


def run(options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Everything, as the result file has it."""
    folder = ROOT / ".demo" / "models" / f"gqa-{options.size}"
    model = make_model(folder, "gqa", size=options.size)
    trace = workload(options)
    fleet = Fleet(
        instances=2,
        device_tokens=options.device_tokens,
        pool_tokens=parse_bytes(options.pool_size) // read_shape(model).kv_bytes_per_token,
        batch_tokens=BATCH_TOKENS,
    )
    arguments = ["--page-size", str(options.page_size), "--chunked-prefill-size", str(BATCH_TOKENS)]
    arguments += ["--max-total-tokens", str(options.device_tokens), *NO_OVERLAP]
    pool = MemcachePool(member_size=options.pool_size)
    with Cluster(
        pool,
        model,
        arguments,
        direct=PATIENCE,
        reference=False,
        log_dir=options.out / "logs",
        progress=say,
    ) as cluster:
        check = Check(options, pool, cluster, trace, fleet, say)
        calibration, timed, answers = check.rounds()
    costs = calibration.costs(f"measured by scripts/plan_check, {time.strftime('%Y-%m-%d')}")
    outcome = Simulation(timed, fleet, costs).run()
    (options.out / "costs.json").write_text(costs.model_dump_json() + "\n", encoding="utf-8")
    (options.out / "trace.jsonl").write_text(replay.written(timed), encoding="utf-8")
    predicted = planned(options, model)
    return {
        **_told(options, timed, answers, predicted),
        # In each round's replay, of all cores.
        "other_programs_percent": check.others_percent,
        # Request by request: tokens from the device, from the pool, seconds.
        "predicted": list(
            zip(outcome.device_tokens, outcome.loaded_tokens, outcome.ttft_s, strict=True)
        ),
        "measured": answers,
        "probes": calibration.told(),
    }


def _told(
    options: argparse.Namespace,
    trace: Trace,
    answers: Sequence[Sequence[replay.Answered]],
    predicted: dict[str, Any],
) -> dict[str, Any]:
    return {
        "date": time.strftime("%Y-%m-%d"),
        "command": "scripts/plan_check",
        "limit_percent": options.limit_percent,
        "figures": compare.rounded(compare.figures(trace, replay.median(answers), predicted)),
        "requests": len(trace.requests),
        "span_s": trace.span_s,
        "prompt_tokens": trace.prompt_tokens,
        "reusable_tokens": reusable_tokens(trace, math.inf)[0],
        "plan": predicted,
    }


def planned(options: argparse.Namespace, model: Path) -> dict[str, Any]:
    """What the command itself says to the trace, the costs and the sizes of this run."""
    command = [str(Path(sys.executable).parent / "ascend-direct"), "plan", "--json"]
    command += ["--model-config", str(model), "--instances", "2"]
    command += ["--trace", str(options.out / "trace.jsonl")]
    command += ["--costs", f"@{options.out / 'costs.json'}", "--pool-size", options.pool_size]
    for flag, number in (
        ("--device-tokens", options.device_tokens),
        ("--page-size", options.page_size),
        ("--block-tokens", options.page_size),
        ("--batch-tokens", BATCH_TOKENS),
    ):
        command += [flag, str(number)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=300)
    (row,) = json.loads(done.stdout)["rows"]
    return dict(row["with_pool"])


def main(argv: Sequence[str] | None = None) -> int:
    """0: all figures within the limit; 1: not, or a probe went wrong; 130: Ctrl-C."""
    options = parse(argv)
    console = Console(soft_wrap=True)
    begin_s = time.monotonic()

    def say(line: str) -> None:
        console.print(f"{time.monotonic() - begin_s:6.1f} s  {line}", highlight=False, markup=False)

    options.out.mkdir(parents=True, exist_ok=True)
    try:
        result = run(options, say)
    except KeyboardInterrupt:
        console.print("interrupted; everything that was started has been stopped")
        return 130
    except NotAsExpected as error:
        console.print(f"FAILED: {error}", markup=False)
        return 1
    (options.out / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    limit = options.limit_percent
    console.print(compare.table(result["figures"], limit))
    busy = ", ".join(f"{percent:g}" for percent in result["other_programs_percent"])
    console.print(f"other programs took so many percent of the cores in the rounds: {busy}")
    console.print(f"costs.json and trace.jsonl for plan, result.json: {options.out}")
    if options.record:
        kept = ("date", "command", "limit_percent", "figures")
        record = json.dumps({name: result[name] for name in kept}, indent=1)
        validation.RECORD.write_text(record + "\n", encoding="utf-8")
        console.print(compare.markdown(result["figures"]), markup=False)
    return int(any(abs(figure["percent"]) > limit for figure in result["figures"]))


if __name__ == "__main__":
    sys.exit(main())
