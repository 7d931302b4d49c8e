# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""docs/operations.md names tests and options that exist."""

from __future__ import annotations

import re
from pathlib import Path

from ascend_direct.config import option_names

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")


def test_each_failure_is_shown_by_a_test_that_exists() -> None:
    sources = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", TEXT))
    assert len(named) >= 10
    assert {name for name in named if f"def {name}(" not in sources} == set()


def test_each_option_it_names_exists() -> None:
    known = set(option_names())
    named = set(re.findall(r"`((?:memcache|local)\.\w+)[:`]", TEXT)) - {"memcache.tls"}
    assert named
    assert named <= known
