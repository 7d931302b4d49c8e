# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""GSM8K: numbers are found, answers counted, failures neither hidden nor scored, load bounded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accuracy import gsm8k
from accuracy.repeat import guarded
from rich.console import Console

from .fake_model import FakeModel

TINY = Path(gsm8k.__file__).with_name("tiny_gsm8k.jsonl")
SHOTS = 2


@pytest.fixture
def model() -> Iterator[FakeModel]:
    """Knows every answer of the tiny set."""
    with FakeModel(delay_s=0.05) as model:
        for problem in gsm8k.read_problems(TINY):
            model.texts[problem.question] = f" It is {problem.answer}"
        yield model


def run(model: FakeModel, out: Path, *more: str) -> tuple[int, dict[str, Any], str]:
    arguments = ["--url", model.url, "--dataset", str(TINY), "--shots", str(SHOTS)]
    console = Console(record=True, width=200)
    options = gsm8k.parse([*arguments, "--out", str(out), *more])
    code = guarded(gsm8k.run, options, console)
    report = out.with_suffix(".report.json")
    return code, json.loads(report.read_text()) if report.exists() else {}, console.export_text()


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("so 3 + 4 = 7.", 7),
        ("that is $1,234.50", 1234.5),
        ("#### 12\nQuestion 13", 12),
        ("it fell to -4 degrees", -4),
        ("I cannot tell", None),
        ("", None),
    ],
)
def test_the_number_of_an_answer_is(answer: str, number: float | None) -> None:
    assert gsm8k.number_in(answer) == number


def test_the_bundled_problems_are_well_formed() -> None:
    problems = gsm8k.read_problems(TINY)
    assert 8 <= len(problems) <= 12
    assert len({p.question for p in problems}) == len(problems)
    prompt = gsm8k.few_shot(problems[:2], problems[2].question)
    assert prompt.count("####") == 2
    assert prompt.endswith(f"Question: {problems[2].question}\nAnswer:")


@pytest.mark.parametrize("api", ["sglang", "openai"])
def test_right_wrong_and_unreadable_answers_are_counted(
    model: FakeModel, tmp_path: Path, api: str
) -> None:
    asked = gsm8k.read_problems(TINY)[SHOTS:]
    model.texts[asked[0].question] = "It is 99999"
    del model.texts[asked[1].question]
    code, report, _ = run(model, tmp_path / "out.jsonl", "--api", api, "--concurrency", "3")
    assert code == 0
    assert (report["questions"], report["correct"]) == (len(asked), len(asked) - 2)
    assert (report["unreadable"], report["errors"]) == (1, 0)
    assert report["accuracy"] == pytest.approx((len(asked) - 2) / len(asked))
    assert report["cached_tokens"] == 2 * len(asked)
    assert 1 < model.most_at_once <= 3


def test_failed_requests_fail_the_run_and_are_asked_again(model: FakeModel, tmp_path: Path) -> None:
    asked = gsm8k.read_problems(TINY)[SHOTS:]
    model.refuse = {asked[3].question}
    code, report, _ = run(model, tmp_path / "out.jsonl")
    assert code == 1
    assert (report["errors"], report["correct"]) == (1, len(asked) - 1)
    model.refuse, before = set(), model.served
    code, report, _ = run(model, tmp_path / "out.jsonl", "--resume")
    assert (code, report["correct"]) == (0, len(asked))
    assert model.served == before + 1


def test_a_score_below_the_bound_fails_and_a_server_that_is_gone_ends_the_run(
    model: FakeModel, tmp_path: Path
) -> None:
    model.texts.clear()
    assert run(model, tmp_path / "low.jsonl", "--min-accuracy", "0.5")[0] == 1
    model.vanish_after = model.served
    code, _, text = run(model, tmp_path / "gone.jsonl")
    assert code == 3
    assert "--resume" in text
