# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""The repeat test: the same prompts to A and then to B must give the same tokens.

Owns the passes over the prompts, their comparison and the report. `Repeat` is also what
tests/e2e runs; the options are for servers that are running already.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from sglang_cpu.client import RequestError, SGLangClient

from accuracy.dataset import DatasetError, Prompt, read_prompts
from accuracy.journal import Journal, JournalError
from accuracy.sending import Sender, client_at, failure, not_done

TIERS = ("device", "host", "storage")
EXIT_OK, EXIT_WRONG, EXIT_USAGE, EXIT_NO_SERVER, EXIT_INTERRUPTED = 0, 1, 2, 3, 130


@dataclass(frozen=True)
class Mismatch:
    """One answer that differs. `first_differing_token` counts from 0."""

    who: str
    prompt: int
    first_differing_token: int
    expected: list[int]
    got: list[int]


@dataclass
class Report:
    """What a run has shown; `tokens_by_tier` has prompt tokens by who answered."""

    truth: str
    answers: int = 0
    identical: int = 0
    mismatches: list[Mismatch] = field(default_factory=list)
    errors: list[dict[str, Any]] = field(default_factory=list)
    missing: int = 0
    distinct_answers: int = 0
    tokens_by_tier: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def problems(self) -> list[str]:
        """Why answers are not to be trusted; empty when all are equal and there."""
        found = [
            f"{m.who}: prompt {m.prompt} differs from {self.truth} at token "
            f"{m.first_differing_token}: {m.got} instead of {m.expected}"
            for m in self.mismatches
        ]
        found += [f"{e['who']}: prompt {e['prompt']} failed: {e['error']}" for e in self.errors]
        found += [f"{self.missing} answers are missing"] if self.missing else []
        found += [] if self.identical else ["no two answers were compared"]
        return found


def first_difference(expected: Sequence[int], got: Sequence[int]) -> int | None:
    """Place of the first token that differs, an end counting as one; None if equal."""
    for place, (left, right) in enumerate(zip(expected, got, strict=False)):
        if left != right:
            return place
    return None if len(expected) == len(got) else min(len(expected), len(got))


class Repeat:
    """Passes of one set of prompts over servers.

    Args:
        output_tokens: tokens that each answer has.
    """

    def __init__(
        self, prompts: Sequence[Prompt], output_tokens: int, journal: Journal, sender: Sender
    ) -> None:
        self._prompts = prompts
        self._output_tokens = output_tokens
        self._journal = journal
        self._sender = sender
        self._asked: dict[str, set[int]] = {}

    def send(self, who: str, server: SGLangClient, numbers: Iterable[int] | None = None) -> None:
        """Ask a server what it has not answered yet; `numbers` defaults to all prompts.

        Raises:
            RequestError: the server is gone. A request that it refuses is an error in the report.
        """
        wanted = list(range(len(self._prompts)) if numbers is None else numbers)
        self._asked.setdefault(who, set()).update(wanted)
        theirs = [row for row in self._journal.rows if row["who"] == who]

        def ask(number: int) -> None:
            self._journal.add({"who": who, "prompt": number, **self._answer(server, number)})

        self._sender.run(who, ask, not_done(wanted, theirs, "prompt"))

    def _answer(self, server: SGLangClient, number: int) -> dict[str, Any]:
        try:
            got = server.generate(
                self._prompts[number],
                self._output_tokens,
                on_part=self._sender.check,
                return_cached_tokens_details=True,
            )
        except RequestError as error:
            return {"error": failure(error)}
        tiers = {tier: got.cached_tokens_details.get(tier, 0) for tier in TIERS}
        return {
            "output_ids": got.output_ids,
            "ttft_s": got.ttft_s,
            "tokens": {"prompt": got.prompt_tokens, **tiers},
        }

    def report(self, truth: str) -> Report:
        """Compare everybody's answers with those of `truth`."""
        last = {(row["who"], row["prompt"]): row for row in self._journal.rows}
        report = Report(truth)
        right = {p: row.get("output_ids") for (who, p), row in last.items() if who == truth}
        report.distinct_answers = len({tuple(ids) for ids in right.values() if ids})
        for who, numbers in self._asked.items():
            tiers = report.tokens_by_tier.setdefault(who, dict.fromkeys(("prompt", *TIERS), 0))
            for number in sorted(numbers):
                row = last.get((who, number))
                if row is None or row.get("error"):
                    report.missing += row is None
                    report.errors += [row] if row else []
                    continue
                report.answers += 1
                for tier, count in row["tokens"].items():
                    tiers[tier] += count
                if who != truth:
                    _compare(report, row, right.get(number))
        return report


def _compare(report: Report, row: dict[str, Any], expected: list[int] | None) -> None:
    if expected is None:
        report.missing += 1
        return
    place = first_difference(expected, row["output_ids"])
    if place is None:
        report.identical += 1
        return
    who, number = row["who"], row["prompt"]
    report.mismatches.append(Mismatch(who, number, place, expected, row["output_ids"]))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Options of scripts/accuracy/repeat."""
    parser = argparse.ArgumentParser(
        prog="scripts/accuracy/repeat",
        description="Send each prompt to server A, then to server B, greedily, and compare the "
        "answers: with those of a server without a cache if --reference names one, else B's with "
        "A's. B must have loaded from the pool. Exit codes: 0 all equal; 1 not; 2 wrong options; "
        "3 a server is gone; 130 interrupted.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--a", required=True, help="http://host:port of server A")
    add("--b", required=True, help="of server B, on the same pool")
    add("--reference", help="of a server of the same model started with --disable-radix-cache")
    add("--dataset", type=Path, required=True, help=".txt (a prompt per line), .json, .jsonl")
    add("--field", help="field of a row; else the first of input_ids, prompt, text, question")
    add("--limit", type=int, help="use only so many prompts")
    add("--output-tokens", type=int, default=4, help="tokens of each answer")
    add("--concurrency", type=int, default=1, help="requests at a time; batches may change tokens")
    add("--settle-s", type=float, default=5.0, help="pause before B, for A's last write-back")
    add("--min-storage-share", type=float, default=0.5, help="of B's prompt tokens; 0: not judged")
    add("--out", type=Path, default=Path("repeat.jsonl"), help="results; the report is beside it")
    add("--resume", action="store_true", help="continue --out where it ended")
    return parser.parse_args(argv)


def run(options: argparse.Namespace, console: Console) -> int:
    """All passes and the report; an exit code."""
    prompts = read_prompts(options.dataset, options.field)[: options.limit]
    digest = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
    urls = {"reference": options.reference, "A": options.a, "B": options.b}
    servers = {who: client_at(url) for who, url in urls.items() if url}
    settings = {"prompts": digest, "output_tokens": options.output_tokens, "servers": urls}
    journal = Journal(options.out, settings, resume=options.resume)
    repeat = Repeat(prompts, options.output_tokens, journal, Sender(console, options.concurrency))
    for who, server in servers.items():
        if who == "B":
            time.sleep(options.settle_s)
        repeat.send(who, server)
    report = repeat.report("reference" if options.reference else "A")
    problems = report.problems
    b = report.tokens_by_tier["B"]
    share = b["storage"] / max(1, b["prompt"])
    if share < options.min_storage_share:
        problems.append(
            f"B took {share:.1%} of its prompt tokens from the pool, expected at least "
            f"{options.min_storage_share:.0%} (--min-storage-share)"
        )
    path = options.out.with_suffix(".report.json")
    whole = {"ok": not problems, "problems": problems, **asdict(report), "settings": settings}
    path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    show(report, problems, console)
    console.print(f"{options.out}, {path}", soft_wrap=True)
    return EXIT_WRONG if problems else EXIT_OK


def show(report: Report, problems: Sequence[str], console: Console) -> None:
    """The report as text."""
    for who, tiers in report.tokens_by_tier.items():
        console.print(f"{who:<10} prompt tokens {tiers['prompt']}: " + _tiers(tiers))
    console.print(f"{report.identical} answers equal {report.truth}'s token for token")
    for problem in problems[:20]:
        console.print(f"  * {problem}", markup=False, soft_wrap=True)
    console.print("PASSED" if not problems else f"FAILED: {len(problems)} problem(s)")


def _tiers(tiers: dict[str, int]) -> str:
    return ", ".join(f"{tier} {tiers[tier]}" for tier in TIERS)


def guarded(body: Any, options: argparse.Namespace, console: Console) -> int:
    """Run a body and turn what can go wrong into a line and an exit code."""
    try:
        return int(body(options, console))
    except (DatasetError, JournalError, ValueError) as error:
        console.print(str(error), markup=False, soft_wrap=True)
        return EXIT_USAGE
    except RequestError as error:
        console.print(f"{error}; go on with --resume", markup=False, soft_wrap=True)
        return EXIT_NO_SERVER
    except KeyboardInterrupt:
        console.print(f"interrupted; {options.out} has what is done, go on with --resume")
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(guarded(run, parse(), Console()))
