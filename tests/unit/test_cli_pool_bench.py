# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""`ascend-direct pool bench` on the local store, and on stores that misbehave."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ascend_direct.cli.main import app
from ascend_direct.store.base import PageBatch, PageStatus, StoreContext
from ascend_direct.store.local import LocalStore, create

runner = CliRunner()
SMALL = ["--page-size", "64KB", "--spans", "4", "--pages", "2", "--seconds", "0.2", "--size", "8MB"]


@pytest.fixture(autouse=True)
def _no_options_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("ASCEND_DIRECT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def section(tmp_path: Path) -> dict[str, object]:
    return {"path": str(tmp_path / "pages"), "size_bytes": 64 << 20}


def config(section: dict[str, object]) -> list[str]:
    return ["--config", json.dumps({"store": "local", "local": section})]


def bench(section: dict[str, object], *arguments: str, code: int = 0) -> dict[str, Any]:
    result = runner.invoke(app, ["pool", "bench", "--json", *config(section), *SMALL, *arguments])
    assert result.exit_code == code, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def pages_left(section: dict[str, object]) -> int | None:
    store = create(section)
    store.open(StoreContext())
    try:
        return store.stats().pages
    finally:
        store.close()


def test_it_measures_both_ways_and_leaves_nothing(section) -> None:
    found = bench(section, "--in-flight", "3")
    for way in ("put", "get"):
        told = found[way]
        assert told["calls"] > 0
        assert told["bytes"] == told["calls"] * 2 * 65536
        assert 0 < told["p50_ms"] <= told["p99_ms"]
        assert told["gib_per_s"] > 0
        assert not told["why"]
    assert found["same_bytes"]
    assert not found["interrupted"]
    assert not found["left"]
    assert found["removed"] == 2 * found["put"]["calls"]
    assert pages_left(section) == 0


def test_it_takes_no_more_room_than_it_was_given(section) -> None:
    assert bench(section, "--size", "1MB", "--seconds", "1")["put"]["calls"] == 8


def test_pages_that_a_small_pool_evicted_are_counted_and_the_others_read(tmp_path: Path) -> None:
    small = {"path": str(tmp_path / "small"), "size_bytes": 2 << 20}
    found = bench(small, "--seconds", "1", "--size", "4MB")
    assert found["put"]["calls"] == 32
    assert found["get"]["calls"] > 0 < found["get"]["refused_pages"]
    assert found["same_bytes"]
    assert pages_left(small) == 0


def test_text_shows_both_ways(section) -> None:
    result = runner.invoke(app, ["pool", "bench", *config(section), *SMALL])
    assert result.exit_code == 0
    rows = [line.split()[1] for line in result.stdout.splitlines() if line.startswith("│")]
    assert rows == ["put", "get"]
    assert "2 pages of 65536 bytes a call, 1 at a time" in result.stdout


def test_other_bytes_are_an_error(section, monkeypatch: pytest.MonkeyPatch) -> None:
    get = LocalStore.get

    def last_byte_flipped(self: LocalStore, keys: list[str], pages: PageBatch) -> list[PageStatus]:
        answers = get(self, keys, pages)
        last = int(pages.addresses[-1, -1]) + pages.lengths_bytes[-1] - 1
        ctypes.c_ubyte.from_address(last).value ^= 1
        return answers

    monkeypatch.setattr(LocalStore, "get", last_byte_flipped)
    assert not bench(section, code=1)["same_bytes"]


def test_a_pool_that_refuses_is_an_error_that_says_why(section, monkeypatch) -> None:
    monkeypatch.setattr(LocalStore, "put", lambda self, keys, pages: [PageStatus.FULL] * len(keys))
    found = bench(section, code=1)
    assert found["put"] == {
        "calls": 0,
        "bytes": 0,
        "refused_pages": 2,
        "why": "the pool answered FULL.",
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--page-size", "many"], "--page-size: 'many' is not a size"),
        (["--page-size", "10", "--spans", "4"], "does not divide into 4 --spans"),
        (["--size", "100KB"], "--size 100KB holds less than the calls at a time: use 1MB"),
        (["--config", '{"store": "redis"}'], "'redis' is not installed"),
    ],
)
def test_a_mistake_exits_with_2(section, arguments, words) -> None:
    result = runner.invoke(app, ["pool", "bench", *config(section), *SMALL, *arguments])
    assert result.exit_code == 2
    assert words in result.stderr


def test_ctrl_c_shows_the_figures_so_far_and_leaves_nothing(section) -> None:
    command = [sys.executable, "-m", "ascend_direct.cli.main", "pool", "bench", "--json"]
    command += [*config(section), *SMALL, "--seconds", "120", "--size", "32MB"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stderr is not None
    assert "if this is killed" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert json.loads(out)["interrupted"]
    assert pages_left(section) == 0
