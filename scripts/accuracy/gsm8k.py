# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Few-shot GSM8K against a running server: SGLang's own API or any OpenAI-compatible one.

Owns prompts, extraction of the number, and the score. The data set is the user's file, rows with
``question`` and ``answer`` that ends in ``#### number``; tiny_gsm8k.jsonl beside this file is ours.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from sglang_cpu.client import RequestError

from accuracy.dataset import DatasetError, read_rows
from accuracy.journal import Journal
from accuracy.repeat import EXIT_OK, EXIT_WRONG, guarded
from accuracy.sending import Sender, client_at, failure, not_done

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
STOP = ["Question:"]


@dataclass(frozen=True)
class Problem:
    """A question, its worked answer, and the number at the answer's end."""

    question: str
    answer: str
    number: float


@dataclass(frozen=True)
class Score:
    """Counts over all questions; `unreadable` answers had no number, `errors` no answer."""

    questions: int
    correct: int
    unreadable: int
    errors: int
    cached_tokens: int

    @property
    def accuracy(self) -> float:
        """Of all questions, those without an answer included."""
        return self.correct / self.questions


def number_in(answer: str) -> float | None:
    """The number an answer ends with: the one after ``####`` if there is one, else the last."""
    _, mark, tail = answer.rpartition("####")
    found = NUMBER.findall(tail if mark else answer)
    if not found:
        return None
    return float((found[0] if mark else found[-1]).replace(",", ""))


def read_problems(path: Path) -> list[Problem]:
    """Rows of a GSM8K file.

    Raises:
        DatasetError: a row lacks the question, or the number at the answer's end.
    """
    problems = []
    for line, row in enumerate(read_rows(path), 1):
        text = row if isinstance(row, dict) else {}
        question, answer = text.get("question"), text.get("answer")
        number = number_in(answer) if isinstance(answer, str) and "####" in answer else None
        if not isinstance(question, str) or number is None:
            raise DatasetError(f"{path}, row {line}: expected question, and answer with #### n")
        problems.append(Problem(question, answer, number))
    return problems


def few_shot(shots: Sequence[Problem], question: str) -> str:
    """Worked examples, then the question."""
    examples = "".join(f"Question: {s.question}\nAnswer: {s.answer}\n\n" for s in shots)
    return f"{examples}Question: {question}\nAnswer:"


class Model:
    """One server, by either API."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._client = client_at(options.url)

    def answer(self, prompt: str) -> dict[str, Any]:
        """Text and cached tokens of a greedy answer."""
        if self._options.api == "openai":
            return self._by_openai(prompt)
        sampling = {"ignore_eos": False, "stop": STOP}
        got = self._client.generate(
            prompt, self._options.max_tokens, stream=False, sampling=sampling
        )
        return {"text": got.text, "cached_tokens": got.cached_tokens}

    def _by_openai(self, prompt: str) -> dict[str, Any]:
        body = {
            "model": self._options.model,
            "prompt": prompt,
            "max_tokens": self._options.max_tokens,
            "temperature": 0,
            "stop": STOP,
        }
        answer = self._client.post("/v1/completions", body)
        details = (answer.get("usage") or {}).get("prompt_tokens_details") or {}
        text = answer["choices"][0]["text"]
        return {"text": text, "cached_tokens": details.get("cached_tokens") or 0}


def score(problems: Sequence[Problem], rows: Sequence[dict[str, Any]]) -> Score:
    """Judge the last row of each question."""
    last = {row["question"]: row for row in rows}
    good = {n: row for n, row in last.items() if not row.get("error")}
    numbers = {n: number_in(row["text"]) for n, row in good.items()}
    return Score(
        questions=len(problems),
        correct=sum(numbers.get(n) == problem.number for n, problem in enumerate(problems)),
        unreadable=sum(number is None for number in numbers.values()),
        errors=len(problems) - len(good),
        cached_tokens=sum(row["cached_tokens"] for row in good.values()),
    )


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Options of scripts/accuracy/gsm8k."""
    parser = argparse.ArgumentParser(
        prog="scripts/accuracy/gsm8k",
        description="Few-shot GSM8K, greedily. The first --shots rows are the examples, the "
        "others are asked. Exit codes: 0 done, and at least --min-accuracy; 1 below it, or "
        "requests failed; 2 wrong options; 3 the server is gone; 130 interrupted.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--url", required=True, help="http://host:port")
    add("--api", choices=("sglang", "openai"), default="sglang", help="/generate or completions")
    add("--model", default="default", help="model name for --api openai")
    add("--dataset", type=Path, required=True, help="JSONL with question and answer (#### n)")
    add("--shots", type=int, default=5, help="worked examples")
    add("--limit", type=int, help="ask only so many questions")
    add("--max-tokens", type=int, default=512, help="longest answer")
    add("--concurrency", type=int, default=16, help="requests at a time")
    add("--min-accuracy", type=float, default=0.0, help="fail below this")
    add("--out", type=Path, default=Path("gsm8k.jsonl"), help="results; the report is beside it")
    add("--resume", action="store_true", help="continue --out; failed requests are asked again")
    return parser.parse_args(argv)


def run(options: argparse.Namespace, console: Console) -> int:
    """Ask, score, report; an exit code."""
    every = read_problems(options.dataset)
    shots, problems = every[: options.shots], every[options.shots :][: options.limit]
    if not problems:
        raise DatasetError(f"{options.dataset} has no question left beside {len(shots)} examples")
    digest = hashlib.sha256(json.dumps([asdict(p) for p in problems + shots]).encode()).hexdigest()
    settings = {"dataset": digest, "max_tokens": options.max_tokens, "url": options.url}
    journal = Journal(options.out, settings, resume=options.resume)
    model = Model(options)

    def ask(number: int) -> None:
        try:
            result = model.answer(few_shot(shots, problems[number].question))
        except RequestError as error:
            result = {"error": failure(error)}
        journal.add({"question": number, **result})

    todo = not_done(range(len(problems)), journal.rows, "question")
    Sender(console, options.concurrency).run("GSM8K", ask, todo)
    result = score(problems, journal.rows)
    ok = not result.errors and result.accuracy >= options.min_accuracy
    whole = {"ok": ok, "accuracy": result.accuracy, **asdict(result), "settings": settings}
    path = options.out.with_suffix(".report.json")
    path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    console.print(
        f"accuracy {result.accuracy:.1%}: {result.correct} of {result.questions}, "
        f"{result.unreadable} without a number, {result.errors} failed; "
        f"{result.cached_tokens} prompt tokens cached"
    )
    console.print(str(path), soft_wrap=True)
    return EXIT_OK if ok else EXIT_WRONG


if __name__ == "__main__":
    sys.exit(guarded(run, parse(), Console()))
