# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Whatever is wrong, the launcher ends with one clear message, soon, before it starts a process."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from ascend_direct.names import FLAG

from .row import Place, Row, stopped
from .table import TABLE

FEWEST_ROWS = 60
LIMIT_S = 15.0  # on a busy machine; a quiet one needs tenths of a second
# Words that tell what to do.
ADVICE = re.compile(
    r"\b(add|choose|correct|delete|did you mean|drop|end|install|lower|make|move|name|requires|run"
    r"|set|source|start|stop|unset|use|write)\b",
    re.IGNORECASE,
)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    with ExitStack() as until_end:
        yield Place(tmp_path, monkeypatch, until_end)


def message(error: BaseException, row: Row) -> str:
    """What the operator reads; a traceback is not made for it."""
    if row.raised_by_sglang:
        assert not isinstance(error, SystemExit)
        return str(error)
    assert isinstance(error, SystemExit), f"a traceback: {error!r}"
    assert isinstance(error.code, str)
    return error.code


def reasons(text: str) -> list[str]:
    """The lines of a list of reasons, or the one sentence that there is."""
    head, *items = text.split("\n  * ")
    if items:
        assert head == f"{FLAG} cannot start:"
    return items or [head]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_a_mistake_is_told_with_what_to_do_before_anything_starts(row: Row, place: Place) -> None:
    children = set(psutil.Process().children(recursive=True))
    started_s = time.monotonic()
    error = stopped(row, place)
    assert time.monotonic() - started_s < LIMIT_S
    assert set(psutil.Process().children(recursive=True)) == children

    told = reasons(message(error, row))
    print("\n".join(told))
    assert len(told) == len(row.said)
    for reason, parts in zip(told, row.said, strict=True):
        for part in parts.replace("{place}", str(place.path)).split("|"):
            assert part in reason
        assert row.raised_by_sglang or ADVICE.search(reason), f"not what to do: {reason}"


def test_the_table_is_large_and_names_each_mistake_once() -> None:
    names = [row.name for row in TABLE]
    assert len(names) >= FEWEST_ROWS
    assert len(names) == len(set(names))


def test_a_row_without_a_mistake_would_start(place: Place) -> None:
    with pytest.raises(pytest.fail.Exception, match="would have started"):
        stopped(Row("nothing", ()), place)


def test_a_row_on_a_pool_without_a_mistake_would_start(place: Place) -> None:
    from .machines import a_pool

    with pytest.raises(pytest.fail.Exception, match="would have started"):
        stopped(Row("nothing", (), {"store": "memcache"}, prepare=a_pool), place)
