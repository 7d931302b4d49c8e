# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Writes the seam table of ascend_direct/integration/seam_table.py into docs/design.md."""

from __future__ import annotations

from pathlib import Path

from ascend_direct.integration.seam_table import SEAMS

DESIGN = Path(__file__).resolve().parents[1] / "docs" / "design.md"
BEGIN, END = "<!-- seams: begin -->\n", "<!-- seams: end -->"


def table() -> str:
    """The table in Markdown."""
    rows = ["| symbol (`sglang.srt.` left out) | kind | why | goes when |", "|---|---|---|---|"]
    for seam in SEAMS:
        path = seam.path.removeprefix("sglang.srt.")
        rows.append(f"| `{path}` | {seam.kind} | {seam.why} | {seam.remove_when} |")
    return "\n".join(rows) + "\n"


def refreshed(text: str) -> str:
    """The document with the table of today."""
    head, rest = text.split(BEGIN)
    return head + BEGIN + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    DESIGN.write_text(refreshed(DESIGN.read_text(encoding="utf-8")), encoding="utf-8")
