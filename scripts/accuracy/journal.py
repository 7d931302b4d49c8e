# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Results that survive an interruption: one JSON line each, on disk before the next is begun.

Owns the file: its first line says what the run was asked for, so that a run is never continued with
other questions. Does not know what a result means.
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class JournalError(RuntimeError):
    """The file is there already, or belongs to another run; the message says what to do."""


class Journal:
    """Rows of one run, in the order in which they came.

    Args:
        settings: what decides the results; must be equal to continue.
        resume: continue the file; without it the file must not exist.
    """

    def __init__(self, path: Path, settings: Row, *, resume: bool = False) -> None:
        self.path = path
        self.rows: list[Row] = []
        self._lock = threading.Lock()
        exists = path.exists() and path.stat().st_size > 0
        if exists and not resume:
            raise JournalError(f"{path} exists: continue it with --resume, or name another --out")
        if exists:
            self._read(settings)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._write({"settings": settings})

    def add(self, row: Row) -> None:
        """Append a row; it is on disk when this returns. Threads may call it at once."""
        with self._lock:
            self._write(row)
            self.rows.append(row)

    def _read(self, settings: Row) -> None:
        whole, _, torn = self.path.read_bytes().rpartition(b"\n")
        if torn:  # the line that was being written when the last run was killed
            with self.path.open("r+b") as file:
                file.truncate(len(whole) + 1 if whole else 0)
        lines = [json.loads(line) for line in whole.splitlines()]
        before = lines[0].get("settings") if lines else None
        if before != json.loads(json.dumps(settings)):
            raise JournalError(
                f"{self.path} is of a run with other settings ({before}): name another --out"
            )
        self.rows = lines[1:]

    def _write(self, row: Row) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
