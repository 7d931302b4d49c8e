# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""The seam table fits the installed SGLang, notices a change, and is what docs/design.md prints."""

from __future__ import annotations

import pytest
from seam_table import DESIGN, refreshed

pytestmark = [
    pytest.mark.sglang,
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning"),
]


def test_every_seam_fits_the_installed_sglang() -> None:
    from ascend_direct.integration import seam

    assert seam.problems() == []


def test_a_symbol_that_is_gone_is_named_with_what_it_was_for() -> None:
    from ascend_direct.integration import seam

    lost = seam.SEAMS[0]._replace(path="sglang.srt.plugins.no_such_symbol")
    first, last = seam.problems((lost,))
    assert "no_such_symbol is gone" in first
    assert lost.why in first
    assert seam.TESTED_SGLANG in last


def test_a_parameter_that_is_gone_is_named() -> None:
    from ascend_direct.integration import seam

    changed = seam.SEAMS[0]._replace(parameters=("target", "colour"))
    assert "colour" in seam.problems((changed,))[0]


def test_the_design_document_prints_the_table() -> None:
    text = DESIGN.read_text(encoding="utf-8")
    assert refreshed(text) == text, "run: .venv/bin/python scripts/seam_table.py"
