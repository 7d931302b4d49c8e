# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Time to first token of real SGLang servers: ours against the other ways to cache a prefix.

Owns the options, the order of turns, progress, and the file of samples. What a turn asks is
serve_cases', which systems there are serve_systems', what comes of it serve_report's.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from sglang_cpu.models import make_model
from sglang_cpu.server import ServerStartError
from two_instances.cluster import PoolProcessError

from bench import serve_report
from bench.serve_cases import (
    VERIFICATION,
    BenchmarkError,
    Sample,
    Truth,
    Turn,
    Workload,
    missed,
    run_turn,
)
from bench.serve_systems import DEFAULT, SYSTEMS, Running, stop_all

ROOT = Path(__file__).resolve().parents[2]
# SGLang's own, or the harness's (sglang_cpu/attention_on_cpu).
ATTENTIONS = {"stock": {}, "new_tokens": {"SGLANG_CPU_ATTENTION": "new_tokens"}}
DESCRIPTION = """\
Send the same prompts to real SGLang servers that cache in different ways, and compare the time to
first token. All systems are up at once and take turns, so that a slow minute of the machine hits
all of them; each turn has prompts of its own. Before anything is timed every system answers the
same prompts, and the run ends if one answer differs, or if a cache did not deliver what it is
compared for; every later answer is compared too.

"within" asks the server that computed the prefix, "cross" another one of the same system, which
can have it only from the pool. Systems without a pool have one server and no "cross"."""
EPILOG = """\
systems (* measured by default; "all" means each of them):
{systems}

Models: "demo" is chosen so that computing the prompt dominates: at 3,500 tokens, some 2 s of it
on a quiet core. "wide" has KV of the size that one rank of a large model has, 113 MB (GQA) and
32 MB (MLA) for that prompt, so that what moving it costs shows; one request at a time only.

Attention: SGLang's own ("stock") goes over the whole prompt even when its KV is there, so an L1
hit costs 20-32 % of a cold prompt, which no NPU's kernel does. "new_tokens" computes the new
tokens only (sglang_cpu/attention_on_cpu), in all servers alike: an L1 hit is then 4-5 % of a
cold prompt, and a millisecond that a cache adds can be seen.

MemCache runs on the driver emulation: the figures say what the systems add to each other on one
machine, never how fast an NPU is. Both kinds of pool are a process that is no server, and hand
pages over through shared memory.

HiCache runs with write_through and wait_complete: with its other policies a request that comes at
once misses what was just computed, or starts before its pages are there, and recomputes them. Its
host <-> device copies on a CPU are ours (scripts/bench/hicache_server.py), one torch copy each.

Ctrl-C keeps what was measured and reports it; --resume goes on. Expect {servers} servers of 2.0 to
2.3 GiB with four pools: 23 GiB in all with GQA, more with MLA (leave systems out with --systems);
2 minutes of start-up per model, and about a minute per round and model."""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Options of scripts/bench/serve."""
    systems = "\n".join(
        f"{'*' if name in DEFAULT else ' ':>3} {name:<17} {system.title}"
        for name, system in SYSTEMS.items()
    )
    servers = sum(SYSTEMS[name].servers for name in DEFAULT)
    parser = argparse.ArgumentParser(
        prog="scripts/bench/serve",
        description=DESCRIPTION,
        epilog=EPILOG.format(systems=systems, servers=servers),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, names = parser.add_argument, [*SYSTEMS, "all"]
    add("--systems", nargs="+", choices=names, default=DEFAULT, metavar="NAME", help="see below")
    add("--models", nargs="+", choices=("gqa", "mla"), default=["gqa", "mla"], help="architectures")
    add("--size", choices=("tiny", "demo", "wide"), default="demo", help="of the models (demo)")
    add(
        "--attention", choices=ATTENTIONS, default="stock", help="of all servers; see below (stock)"
    )
    add("--reuse", nargs="+", type=int, default=[0, 50, 100], help="percent (0 50 100)")
    add("--concurrency", nargs="+", type=int, default=[1, 8], help="requests at a time (1 8)")
    add("--no-trace", action="store_true", help="leave out the multi-turn conversation")
    add("--repeats", type=int, default=7, help="rounds over the systems (7)")
    add("--heavy-repeats", type=int, default=2, help="rounds with bursts and conversations (2)")
    add("--prompts", type=int, default=1, help="prompts of each kind in a turn (1)")
    add("--prompt-tokens", type=int, default=3500, help="length of a prompt (3500)")
    add("--output-tokens", type=int, default=4, help="length of an answer (4)")
    add("--page-size", type=int, default=128, help="tokens per page, 128 as on an NPU")
    add("--resume", action="store_true", help="go on with the samples in --out")
    add("--out", type=Path, default=ROOT / ".demo" / "serve", help="folder of results")
    options = parser.parse_args(argv)
    if "all" in options.systems:
        options.systems = list(SYSTEMS)
    if options.size == "wide" and max(options.concurrency) > 1:
        parser.error("the pools have no room for bursts of the wide model: add --concurrency 1")
    return options


def device_tokens(options: argparse.Namespace) -> int:
    """Of a server's device cache: what a turn computes stays there, to be asked for again."""
    groups = options.prompts * max(len([reuse for reuse in options.reuse if reuse]), 1)
    tokens = 2 * max(groups, *options.concurrency) * options.prompt_tokens
    return -(-tokens // options.page_size) * options.page_size


class Recorder:
    """The file of samples: one JSON object a line, written as they come."""

    def __init__(self, path: Path, options: argparse.Namespace) -> None:
        """Start the file, or with --resume read what is there.

        Raises:
            BenchmarkError: the file to go on with was made with other options.
        """
        self._path = path
        self._described = describe(options)
        self.samples: list[Sample] = []
        self.done: set[tuple[Any, ...]] = set()
        if options.resume and path.exists():
            self._read()
        else:
            path.write_text(json.dumps(self._described) + "\n", encoding="utf-8")

    def _read(self) -> None:
        lines = serve_report.read_lines(self._path)
        if not lines or {**lines[0], "date": ""} != {**self._described, "date": ""}:
            raise BenchmarkError(f"{self._path} was made with other options: choose another --out")
        self.done = {tuple(line["turn"]) for line in lines if line["kind"] == "turn"}
        taken = serve_report.samples(lines)
        self.samples = [sample for sample in taken if sample.turn.key in self.done]
        # What a turn that was cut off has left goes; the rest of the file stays as it was.
        kept = [lines[0], *(sample.line() for sample in self.samples)]
        kept += [{"kind": "turn", "turn": key} for key in sorted(self.done)]
        new = self._path.with_suffix(".new")
        new.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        new.replace(self._path)

    def add(self, turn: Turn, samples: Sequence[Sample]) -> None:
        """A turn is written whole or not at all, so that --resume repeats what was cut off."""
        lines = [sample.line() for sample in samples] + [{"kind": "turn", "turn": turn.key}]
        with self._path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))
        self.samples += samples
        self.done.add(turn.key)


def describe(options: argparse.Namespace) -> dict[str, Any]:
    """First line of the file: how it was made. Repeats may grow from run to run."""
    same = ("size", "attention", "prompt_tokens", "output_tokens", "page_size", "prompts", "reuse")
    load = [round(value, 1) for value in os.getloadavg()]
    date = f"{time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}, load {load}"
    return {"kind": "run", "date": date, **{name: getattr(options, name) for name in same}}


def turns(options: argparse.Namespace, model: str) -> Iterator[Turn]:
    """Rounds over systems over cases; each round starts with another system."""
    for number in range(options.repeats):
        cases = [("single", 1)] if 1 in options.concurrency else []
        if number >= options.repeats - options.heavy_repeats:
            cases += [("burst", n) for n in options.concurrency if n > 1]
            cases += [] if options.no_trace else [("trace", 1)]
        first = number % len(options.systems)
        for system in options.systems[first:] + options.systems[:first]:
            for case, concurrency in cases:
                yield Turn(model, system, number, case, concurrency)


class Benchmark:
    """One run."""

    def __init__(self, options: argparse.Namespace, recorder: Recorder, console: Console) -> None:
        self._options = options
        self._recorder = recorder
        self._console = console
        self._begin_s = time.monotonic()
        self._took_s: dict[str, list[float]] = {}
        self._arguments = ["--page-size", str(options.page_size)]
        self._arguments += ["--max-total-tokens", str(device_tokens(options))]
        self._truth = Truth()
        for sample in recorder.samples:
            self._truth.problems(sample)
        self._work = Workload(
            options.prompt_tokens,
            options.prompts,
            options.reuse,
            options.output_tokens,
            options.page_size,
        )

    def progress(self, line: str) -> None:
        """A line with the time since the start."""
        elapsed_s = time.monotonic() - self._begin_s
        self._console.print(f"{elapsed_s:6.0f} s  {line}", highlight=False, markup=False)

    def run(self) -> None:
        """All models, one after another.

        Raises:
            BenchmarkError: answers differ, or a cache did not deliver.
        """
        for number, model in enumerate(self._options.models):
            todo = [t for t in turns(self._options, model) if t.key not in self._recorder.done]
            if todo:
                self._run_model(model, todo, self._options.models[number + 1 :])

    def _run_model(self, model: str, todo: Sequence[Turn], later: Sequence[str]) -> None:
        options = self._options
        path = ROOT / ".demo" / "models" / f"{model}-{options.size}"
        make_model(path, model, size=options.size)
        with ExitStack() as undo:
            running = self._start(model, path, undo)
            undo.callback(stop_all, list(running.values()))
            self._verify(model, running)
            ahead = [t for name in later for t in turns(options, name)]
            for number, turn in enumerate(todo):
                self._take(turn, running[turn.system], [*todo[number:], *ahead])

    def _start(self, model: str, path: Path, undo: ExitStack) -> dict[str, Running]:
        """Two systems load at a time: more would fight over the cores."""
        running: dict[str, Running] = {}
        for first in range(0, len(self._options.systems), 2):
            names = self._options.systems[first : first + 2]
            for name in names:
                self.progress(f"{model}: starting {SYSTEMS[name].title}")
                running[name] = Running(
                    name,
                    path,
                    self._arguments,
                    env=ATTENTIONS[self._options.attention],
                    log_dir=self._options.out / "logs" / model,
                    undo=undo,
                    progress=self.progress,
                )
            for name in names:
                running[name].wait_ready()
        return running

    def _verify(self, model: str, running: dict[str, Running]) -> None:
        for name, servers in running.items():
            self.progress(f"{model}: verifying the answers of {SYSTEMS[name].title}")
            self._checked(Turn(model, name, VERIFICATION, "single", 1), servers)

    def _take(self, turn: Turn, running: Running, ahead: Sequence[Turn]) -> None:
        start_s = time.monotonic()
        samples = self._checked(turn, running)
        self._recorder.add(turn, samples)
        self._took_s.setdefault(turn.case, []).append(time.monotonic() - start_s)
        known = {case: sum(took) / len(took) for case, took in self._took_s.items()}
        usual = sum(known.values()) / len(known)
        left_s = sum(known.get(t.case, usual) for t in ahead[1:])
        name = f"{turn.model} round {turn.round + 1} {turn.system} {turn.case}"
        shown = ", ".join(
            f"{s.where} {s.reuse}: {1e3 * sum(s.ttft_s) / len(s.ttft_s):.0f}" for s in samples
        )
        self.progress(f"{name:<30} TTFT ms {shown}; {left_s / 60:.0f} min left")

    def _checked(self, turn: Turn, running: Running) -> list[Sample]:
        samples = run_turn(turn, running, self._work)
        problems = [p for sample in samples for p in self._truth.problems(sample)]
        hits = (missed(sample, running.system, self._work) for sample in samples)
        problems += [problem for problem in hits if problem]
        if problems:
            raise BenchmarkError("\n".join(problems))
        return samples


def main(argv: Sequence[str] | None = None) -> int:
    """0: measured and reported; 1: a system failed the comparison; 130: interrupted."""
    options = parse(argv)
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell may have started us deaf to Ctrl-C
        signal.signal(number, signal.default_int_handler)
    console = Console(soft_wrap=True)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "samples.jsonl"
    code = 0
    try:
        Benchmark(options, Recorder(path, options), console).run()
    except KeyboardInterrupt:
        console.print("interrupted; --resume goes on")
        code = 130
    except (BenchmarkError, PoolProcessError, ServerStartError) as error:
        console.print(f"FAILED: {error}", style="red", markup=False, highlight=False)
        code = 1
    if path.exists():
        for file in serve_report.write(path, options.out):
            console.print(str(file))
    return code


if __name__ == "__main__":
    sys.exit(main())
