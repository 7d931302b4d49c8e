# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""A `MemoryPool` that several processes share: one file per object in a folder on tmpfs.

Owns nothing but the files. As in a real pool a write is first-write-wins and a read sees a whole
object or none.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from ..fakes.memory_store import MemoryPool

_UNFINISHED = ".part"


class FilePool(MemoryPool):
    """Unbounded; opened by each process on the same folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def __contains__(self, key: str) -> bool:
        return (self._folder / key).exists()

    def __len__(self) -> int:
        return len(self.keys())

    def keys(self) -> list[str]:
        """All keys, in a fixed order."""
        return sorted(n for n in os.listdir(self._folder) if not n.startswith(_UNFINISHED))

    def read(self, key: str) -> bytes | None:
        """The object; None if absent."""
        try:
            return (self._folder / key).read_bytes()
        except FileNotFoundError:
            return None

    def write(self, key: str, data: bytes) -> bool:
        """Store unless the key exists."""
        handle, name = tempfile.mkstemp(prefix=_UNFINISHED, dir=self._folder)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        try:
            os.link(name, self._folder / key)
        except FileExistsError:
            pass  # the first write wins
        finally:
            os.unlink(name)
        return True

    def drop(self, *keys: str) -> None:
        """Remove keys, as an eviction or a lost member would."""
        for key in keys:
            (self._folder / key).unlink(missing_ok=True)
