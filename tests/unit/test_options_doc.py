# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""docs/configuration.md says what config.py declares, neither more nor less."""

from __future__ import annotations

import options_doc

from ascend_direct.config import option_names
from ascend_direct.config_text import variable


def test_the_page_is_what_the_options_make() -> None:
    assert options_doc.PAGE.read_text(encoding="utf-8") == options_doc.page(), (
        "run python scripts/options_doc.py"
    )


def test_every_option_has_one_row_with_its_variable() -> None:
    rows = [line for line in options_doc.page().splitlines() if line.startswith("| `")]
    names = [(row.split("`")[1], row.split("`")[-2]) for row in rows]
    assert sorted(names) == sorted((name, variable(name)) for name in option_names())


def test_no_cell_is_empty() -> None:
    for line in options_doc.page().splitlines():
        if line.startswith("| `"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            assert len(cells) == 5, line
            assert all(cells), line
