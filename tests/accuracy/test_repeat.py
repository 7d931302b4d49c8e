# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""The repeat test finds what is wrong, passes what is right, and goes on where it was cut off."""

from __future__ import annotations

import functools
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accuracy import repeat
from accuracy.dataset import DatasetError, read_prompts
from rich.console import Console

from .fake_model import FakeModel

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = [[n, *range(100, 163)] for n in range(1, 7)]


@pytest.fixture
def pair() -> Iterator[tuple[FakeModel, FakeModel]]:
    pool: set[tuple[int, ...]] = set()
    with FakeModel(pool) as a, FakeModel(pool) as b:
        yield a, b


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"input_ids": p}) + "\n" for p in PROMPTS))
    return path


def run(
    pair: tuple[FakeModel, FakeModel], dataset: Path, *more: str
) -> tuple[int, dict[str, Any], str]:
    out = dataset.with_name("out.jsonl")
    servers = ["--a", pair[0].url, "--b", pair[1].url, "--settle-s", "0"]
    console = Console(record=True, width=200)
    options = repeat.parse([*servers, "--dataset", str(dataset), "--out", str(out), *more])
    code = repeat.guarded(repeat.run, options, console)
    report = out.with_suffix(".report.json")
    written = json.loads(report.read_text()) if report.exists() else {}
    return code, written, console.export_text()


def test_equal_answers_from_the_pool_pass_and_are_counted(
    pair: tuple[FakeModel, FakeModel], dataset: Path
) -> None:
    code, report, text = run(pair, dataset)
    assert code == 0, text
    assert report["identical"] == report["distinct_answers"] == len(PROMPTS)
    assert report["tokens_by_tier"]["B"] == {"prompt": 384, "device": 0, "host": 0, "storage": 288}
    assert "PASSED" in text


def test_a_wrong_answer_is_listed_with_its_first_differing_token(
    pair: tuple[FakeModel, FakeModel], dataset: Path
) -> None:
    pair[1].wrong = {3}
    code, report, text = run(pair, dataset)
    assert code == 1
    [mismatch] = report["mismatches"]
    assert (mismatch["who"], mismatch["prompt"], mismatch["first_differing_token"]) == ("B", 2, 1)
    assert "differs from A at token 1" in text


def test_a_reference_shows_that_both_are_wrong(
    pair: tuple[FakeModel, FakeModel], dataset: Path
) -> None:
    for server in pair:
        server.wrong = {5}
    with FakeModel() as reference:
        code, report, _ = run(pair, dataset, "--reference", reference.url)
    assert code == 1
    assert [(m["who"], m["prompt"]) for m in report["mismatches"]] == [("A", 4), ("B", 4)]


def test_a_pool_that_gives_nothing_fails_the_run(dataset: Path) -> None:
    with FakeModel() as a, FakeModel() as b:
        code, _, text = run((a, b), dataset)
        assert code == 1
        assert "B took 0.0% of its prompt tokens from the pool" in text


def test_a_run_whose_server_vanishes_is_continued_without_asking_twice(
    pair: tuple[FakeModel, FakeModel], dataset: Path
) -> None:
    pair[1].vanish_after = 2
    code, _, text = run(pair, dataset)
    assert code == 3, text
    assert "--resume" in text
    pair[1].vanish_after = None
    assert run(pair, dataset)[0] == 2, "without --resume nothing is overwritten"
    out = dataset.with_name("out.jsonl")
    with out.open("a") as file:
        file.write('{"who": "B", "pro')  # killed while it wrote
    code, report, text = run(pair, dataset, "--resume")
    assert code == 0, text
    assert report["identical"] == len(PROMPTS)
    assert pair[0].served == len(PROMPTS)
    assert pair[1].served == len(PROMPTS) + 1, "two before, one lost, four after"


def test_a_run_is_not_continued_with_other_prompts(
    pair: tuple[FakeModel, FakeModel], dataset: Path
) -> None:
    assert run(pair, dataset)[0] == 0
    code, _, text = run(pair, dataset, "--resume", "--limit", "2")
    assert code == 2
    assert "other settings" in text


def test_a_refused_request_is_reported_and_asked_again(
    pair: tuple[FakeModel, FakeModel], dataset: Path
) -> None:
    pair[0].refuse = {2}
    code, report, _ = run(pair, dataset)
    assert code == 1
    assert [e["prompt"] for e in report["errors"]] == [1]
    pair[0].refuse = set()
    assert run(pair, dataset, "--resume")[0] == 0


def test_ctrl_c_keeps_the_results(dataset: Path) -> None:
    pool: set[tuple[int, ...]] = set()
    out = dataset.with_name("out.jsonl")
    # B's first answers take longer than a busy machine needs to deliver the signal.
    with FakeModel(pool) as a, FakeModel(pool, delay_s=15.0) as b:
        command = [sys.executable, "-m", "accuracy.repeat", "--a", a.url, "--b", b.url]
        with subprocess.Popen(
            [*command, "--dataset", str(dataset), "--out", str(out)],
            cwd=ROOT / "scripts",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # Whoever runs the tests in the background may have it ignored, which is inherited.
            preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        ) as process:
            deadline_s = time.monotonic() + 60
            while not out.exists() or out.read_bytes().count(b"\n") < 3:
                assert time.monotonic() < deadline_s
                time.sleep(0.02)
            process.send_signal(signal.SIGINT)
            pressed_again = False
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                # Python drops a KeyboardInterrupt that falls into a weak reference's callback, and
                # says so; whoever pressed Ctrl-C presses it again.
                pressed_again = True
                process.send_signal(signal.SIGINT)
            text, _ = process.communicate(timeout=120)
    assert process.returncode == 130, text
    dropped = text.count("Exception ignored in")  # with a traceback each, of Python's
    assert text.count("Traceback") == dropped == int(pressed_again), text
    lines = out.read_text().splitlines()
    assert 3 <= len(lines) < 1 + 2 * len(PROMPTS), "the settings, then some of the answers"
    assert all(json.loads(line) for line in lines)


@pytest.mark.parametrize(
    ("name", "text", "prompts"),
    [
        ("a.txt", "one\n\ntwo\n", ["one", "two"]),
        ("a.json", '["one", [1, 2], {"text": "three", "x": 1}]', ["one", [1, 2], "three"]),
        ("a.jsonl", '{"question": "q", "answer": "a"}\n', ["q"]),
    ],
)
def test_prompts_are_read_from(
    tmp_path: Path, name: str, text: str, prompts: list[str | list[int]]
) -> None:
    (tmp_path / name).write_text(text)
    assert read_prompts(tmp_path / name) == prompts


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("a.jsonl", '{"prompt": "x"}\n{"prompt"\n', "line 2"),
        ("a.jsonl", '{"prompt": "x"}\n{"title": "y"}\n', "row 2"),
        ("a.json", '[[1, "2"]]', "row 1"),
        ("a.json", '{"prompt": "x"}', "a list of rows"),
        ("a.txt", "\n\n", "no rows"),
    ],
)
def test_a_file_without_prompts_is_refused(
    tmp_path: Path, name: str, text: str, complaint: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DatasetError, match=complaint):
        read_prompts(tmp_path / name)
