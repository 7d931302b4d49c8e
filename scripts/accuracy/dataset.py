# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Prompts from a file of the user's.

``.txt``: a prompt per line, blank lines left out. ``.json``: a list of rows. ``.jsonl``: a row per
line. A row is a text, a list of token ids, or an object with one of FIELDS; others are ignored.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FIELDS = ("input_ids", "prompt", "text", "question")

Prompt = str | list[int]


class DatasetError(ValueError):
    """A file that holds no prompts; the message names the row."""


def read_rows(path: Path) -> list[Any]:
    """The rows of a .json or .jsonl file, the lines of any other."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path} cannot be read: {error}") from error
    lines = [(n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    try:
        if path.suffix == ".json":
            rows = json.loads(text)
            if not isinstance(rows, list):
                raise DatasetError(f"{path}: a list of rows is expected")
            return rows
        if path.suffix != ".jsonl":
            return [line for _, line in lines]
    except json.JSONDecodeError as error:
        raise DatasetError(f"{path}: {error}") from error
    return [_json_line(path, number, line) for number, line in lines]


def read_prompts(path: Path, field: str | None = None) -> list[Prompt]:
    """Every prompt of a file, as text or token ids."""
    rows = read_rows(path)
    if not rows:
        raise DatasetError(f"{path} has no rows")
    fields = (field,) if field else FIELDS
    return [_prompt(path, number, row, fields) for number, row in enumerate(rows, 1)]


def _json_line(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise DatasetError(f"{path}, line {number}: {error}") from error


def _prompt(path: Path, number: int, row: Any, fields: tuple[str, ...]) -> Prompt:
    value = next((row[f] for f in fields if f in row), None) if isinstance(row, dict) else row
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list) and value and all(type(token) is int for token in value):
        return value
    raise DatasetError(f"{path}, row {number}: no prompt; expected text or ids in {fields}")
