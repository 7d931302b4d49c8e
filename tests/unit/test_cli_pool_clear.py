# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""`ascend-direct pool clear` on the local store: what goes, what stays, what is asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from ascend_direct.cli.main import app
from ascend_direct.store.base import PageBatch, PageStatus, StoreContext
from ascend_direct.store.local import create

runner = CliRunner()
OURS, THEIRS = "0123456789abcdef", "fedcba9876543210"
KEYS = [f"ad1:{OURS}:-:{i}" for i in range(5)] + [f"ad1:{THEIRS}:-:{i}" for i in range(3)]
FOREIGN = "another program's"


@pytest.fixture(autouse=True)
def _no_options_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("ASCEND_DIRECT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def section(tmp_path: Path) -> dict[str, object]:
    """A local store that holds `KEYS` and `FOREIGN`, closed."""
    section = {"path": str(tmp_path / "pages"), "size_bytes": 16 << 20}
    store = create(section)
    store.open(StoreContext())
    memory = np.arange(256, dtype=np.uint8)
    names = [*KEYS, FOREIGN]
    pages = PageBatch(np.full((len(names), 1), memory.ctypes.data, np.int64), (256,))
    assert store.put(names, pages) == [PageStatus.OK] * len(names)
    store.close()
    return section


def clear(section: dict[str, object], *arguments: str, answer: str | None = None):
    config = json.dumps({"store": "local", "local": section})
    return runner.invoke(app, ["pool", "clear", "--config", config, *arguments], input=answer)


def left(section: dict[str, object]) -> list[str]:
    store = create(section)
    store.open(StoreContext())
    names = [*KEYS, FOREIGN]
    found = zip(names, store.exists(names), strict=True)
    held = [name for name, status in found if status is PageStatus.OK]
    assert store.stats().pages == len(held)
    store.close()
    return held


def test_its_help_says_what_it_asks_and_its_exit_codes() -> None:
    text = " ".join(runner.invoke(app, ["pool", "clear", "--help"]).stdout.split())
    for words in ("Asks first", "--yes", "--json", "1 the answer was no", "3 the pool is not"):
        assert words in text


def test_one_namespace_goes_and_the_others_stay(section) -> None:
    result = clear(section, "--namespace", OURS, "--yes")
    assert result.exit_code == 0
    assert result.stdout == f"removed 5 objects from {section['path']}\n"
    assert left(section) == [*KEYS[5:], FOREIGN]


def test_without_a_namespace_all_our_pages_go(section) -> None:
    assert clear(section, "--yes").exit_code == 0
    assert left(section) == [FOREIGN]


def test_everything_is_everything(section) -> None:
    assert clear(section, "--everything", "--yes").exit_code == 0
    assert left(section) == []


def test_json_is_one_object(section) -> None:
    result = clear(section, "--yes", "--json")
    assert json.loads(result.stdout) == {
        "event": "cleared",
        "pool": section["path"],
        "prefix": "ad1:",
        "removed": 8,
    }


@pytest.mark.parametrize("answer", ["n\n", "\n", ""])
def test_it_asks_and_names_the_pool_and_anything_but_yes_is_no(section, answer) -> None:
    result = clear(section, answer=answer)
    assert result.exit_code == 1
    assert f"Remove all pages of ascend_direct from the pool {section['path']}?" in result.stderr
    assert "removed" not in result.stdout
    assert len(left(section)) == 9


def test_yes_is_yes(section) -> None:
    assert clear(section, answer="y\n").exit_code == 0
    assert left(section) == [FOREIGN]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--namespace", "mine"], "give 16 hexadecimal digits"),
        (["--namespace", OURS, "--everything"], "give one of them"),
        (["--config", '{"store": "redis"}'], "'redis' is not installed"),
        (["--config", "{"], "--config is not JSON"),
    ],
)
def test_a_mistake_exits_with_2_before_anything_is_asked(section, arguments, words) -> None:
    result = clear(section, *arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert "Remove" not in result.stderr
    assert len(left(section)) == 9


def test_servers_that_have_the_file_open_go_on(section) -> None:
    server = create(section)
    server.open(StoreContext())
    config = json.dumps({"store": "local", "local": section})

    command = [sys.executable, "-m", "ascend_direct.cli.main", "pool", "clear", "--yes", "--json"]
    done = subprocess.run(
        [*command, "--config", config], capture_output=True, text=True, timeout=60, check=True
    )
    assert json.loads(done.stdout)["removed"] == 8
    memory = np.zeros(256, dtype=np.uint8)
    pages = PageBatch(np.array([[memory.ctypes.data]]), (256,))
    assert server.get(KEYS[:1], pages) == [PageStatus.MISSING]
    assert server.put(KEYS[:1], pages) == [PageStatus.OK]
    assert server.get(KEYS[:1], pages) == [PageStatus.OK]
    server.close()
