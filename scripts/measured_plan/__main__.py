# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Two real servers answer a trace, `ascend-direct plan`'s simulation does; the two are compared.

Owns the options, the order of things and the exit code.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from sglang_cpu.models import make_model
from two_instances.cluster import Cluster, MemcachePool

from ascend_direct.cli.planning import validation
from ascend_direct.cli.planning.costs import Costs
from ascend_direct.cli.planning.model_shape import read_shape
from ascend_direct.cli.planning.simulation import Fleet, Outcome, Simulation
from ascend_direct.cli.planning.synthetic import Synthetic, generate
from ascend_direct.cli.planning.traces import Trace
from ascend_direct.config import parse_bytes
from measured_plan import compare, replay
from measured_plan.calibrate import Calibration, NotAsExpected

ROOT = Path(__file__).resolve().parents[2]
BATCH_TOKENS = 8192
# On a busy machine a call may take longer than in production; a miss would prove nothing.
PATIENCE = {"lookup_timeout_ms": 5_000, "load_timeout_ms": 20_000}
FAR_APART_S = 1000.0


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
    add("--requests", type=int, default=120, help="of the trace")
    add("--longest", type=int, default=3584, help="tokens of the longest prompt")
    add("--busy", type=float, default=0.5, help="share of the time that servers shall compute")
    add("--device-tokens", type=int, default=16384, help="KV of a server (--max-total-tokens)")
    add("--pool-size", default="128MB", help="memory of the pool's member")
    add("--page-size", type=int, default=64, help="tokens of a page")
    add("--lengths", type=int, nargs="+", default=[512, 1280, 2304, 3584], help="of the probes")
    add("--repeats", type=int, default=3, help="probes of each length and kind")
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
    cluster: Cluster
    trace: Trace
    fleet: Fleet
    say: Callable[[str], None]

    def calibrate(self, when: str) -> Calibration:
        """Probes; afterwards neither the servers nor the pool hold anything of them."""
        options = self.options
        calibration = Calibration(self.cluster, options.page_size)
        calibration.warm_up(options.lengths[0])
        for number in range(options.repeats):
            self.say(f"{when}: probes, round {number + 1} of {options.repeats}")
            for length in options.lengths:
                calibration.length(length, seed=1000 * (number + 1) + length)
                self.flush()
        self.clear()
        return calibration

    def flush(self) -> None:
        for name in ("A", "B"):
            self.cluster.servers[name].flush()

    def clear(self) -> None:
        """Nothing of the probes may be found, nor make others' pages go."""
        self.flush()
        command = [str(Path(sys.executable).parent / "ascend-direct"), "pool", "clear", "--yes"]
        command += ["--config", json.dumps(self.cluster.pool.options())]
        environment = {**__import__("os").environ, **self.cluster.pool.environment()}
        subprocess.run(command, env=environment, check=True, capture_output=True, timeout=120)
        left = self.cluster.pool.stored_pages()
        if left:
            raise NotAsExpected(f"{left} pages of the probes are still in the pool")

    def pace(self, costs: Costs) -> float:
        """How far apart requests must be for servers that are as busy as wanted."""
        outcome = Simulation(replay.at_pace(self.trace, FAR_APART_S), self.fleet, costs).run()
        servers_s = self.fleet.instances * self.trace.span_s
        return outcome.busy_s / self.options.busy / servers_s

    def replay(self, trace: Trace) -> list[replay.Answered]:
        servers = [self.cluster.servers[name] for name in ("A", "B")]
        if self.options.one_by_one:
            return replay.one_by_one(trace, servers, self.settle)
        return replay.open_loop(trace, servers, self.say)

    def settle(self) -> None:
        """Until the pool's pages are the same for a while."""
        held, since_s = -1, time.monotonic()
        while time.monotonic() - since_s < 0.3:
            now = self.cluster.pool.stored_pages()
            if now != held:
                held, since_s = now, time.monotonic()
            time.sleep(0.05)


def run(options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Everything, as the result file has it."""
    folder = ROOT / ".demo" / "models" / f"gqa-{options.size}"
    model = make_model(folder, "gqa", size=options.size)
    shape = read_shape(model)
    trace = workload(options)
    fleet = Fleet(
        instances=2,
        device_tokens=options.device_tokens,
        pool_tokens=parse_bytes(options.pool_size) // shape.kv_bytes_per_token,
        batch_tokens=BATCH_TOKENS,
    )
    arguments = ["--page-size", str(options.page_size), "--chunked-prefill-size", str(BATCH_TOKENS)]
    arguments += ["--max-total-tokens", str(options.device_tokens)]
    with Cluster(
        MemcachePool(member_size=options.pool_size),
        model,
        arguments,
        direct=PATIENCE,
        reference=False,
        log_dir=options.out / "logs",
        progress=say,
    ) as cluster:
        check = Check(options, cluster, trace, fleet, say)
        before = check.calibrate("before")
        factor = FAR_APART_S if options.one_by_one else check.pace(before.costs(""))
        timed = replay.at_pace(trace, factor)
        say(f"replaying {len(timed.requests)} requests")
        answers = check.replay(timed if not options.one_by_one else trace)
    costs = before.costs(f"measured by scripts/plan_check, {time.strftime('%Y-%m-%d')}")
    outcome = Simulation(timed, fleet, costs).run()
    return _result(options, timed, costs, answers, outcome, before)


def _result(
    options: argparse.Namespace,
    trace: Trace,
    costs: Costs,
    answers: Sequence[replay.Answered],
    outcome: Outcome,
    calibration: Calibration,
) -> dict[str, Any]:
    found = compare.rounded(compare.figures(trace, answers, outcome))
    each = [
        {**answer._asdict(), "predicted": (device, loaded, ttft_s), "tokens": request.prompt_tokens}
        for request, answer, device, loaded, ttft_s in zip(
            trace.requests,
            answers,
            outcome.device_tokens,
            outcome.loaded_tokens,
            outcome.ttft_s,
            strict=True,
        )
    ]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "command": "scripts/plan_check",
        "limit_percent": options.limit_percent,
        "figures": found,
        "costs": costs.model_dump(),
        "requests": each,
        "span_s": trace.span_s,
        "probes": calibration.told(),
    }


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
    (options.out / "costs.json").write_text(json.dumps(result["costs"]) + "\n", encoding="utf-8")
    limit = options.limit_percent
    console.print(compare.table(result["figures"], limit))
    console.print(f"costs for plan --costs, and all requests: {options.out}")
    if options.record:
        kept = ("date", "command", "limit_percent", "figures")
        record = json.dumps({name: result[name] for name in kept}, indent=1)
        validation.RECORD.write_text(record + "\n", encoding="utf-8")
        console.print(compare.markdown(result["figures"]), markup=False)
    return int(any(abs(figure["percent"]) > limit for figure in result["figures"]))


if __name__ == "__main__":
    sys.exit(main())
