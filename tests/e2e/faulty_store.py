# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""A third-party page store whose faults are switched from outside: the local store, disturbed.

Owns the provider side only. It is copied beside an entry point of its own and imported by servers
as an operator's provider would be, so it must not import anything of the tests. `faults` switches.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ascend_direct.errors import StoreUnavailable
from ascend_direct.store import local
from ascend_direct.store.base import PageBatch, PageStatus, PageStore, StoreContext, StoreStats

LONGEST_HANG_S = 120.0


def create(options: dict[str, Any]) -> PageStore:
    """Entry point: the local store's options, and `control`, the folder faults are read from."""
    control = Path(options.pop("control"))
    return FaultyStore(local.create(options), control)


class FaultyStore(PageStore):
    """Passes every call on, unless a file named after the operation says otherwise.

    The file holds a mode and seconds: `delay 2`, `hang`, `raise`, `missing` or `negate`.
    """

    name = "e2e_faulty"

    def __init__(self, inner: PageStore, control: Path) -> None:
        self._inner = inner
        self._control = control

    def problems(self) -> list[str]:
        return self._inner.problems()

    def open(self, context: StoreContext) -> None:
        self._inner.open(context)

    def exists(self, keys: Sequence[str]) -> list[PageStatus]:
        return self._disturbed("exists", keys) or self._inner.exists(keys)

    def get(self, keys: Sequence[str], pages: PageBatch) -> list[PageStatus]:
        answers = self._disturbed("get", keys) or self._inner.get(keys, pages)
        if self._mode("get")[:1] == ["negate"]:
            _negate(pages)
        return answers

    def put(self, keys: Sequence[str], pages: PageBatch) -> list[PageStatus]:
        return self._disturbed("put", keys) or self._inner.put(keys, pages)

    def stats(self) -> StoreStats:
        return self._inner.stats()

    def close(self) -> None:
        self._inner.close()

    def _mode(self, operation: str) -> list[str]:
        try:
            return (self._control / operation).read_text().split()
        except FileNotFoundError:
            return []

    def _disturbed(self, operation: str, keys: Sequence[str]) -> list[PageStatus]:
        """Answers to give instead of the store's; [] when the store shall be asked."""
        mode = self._mode(operation)
        if not mode:
            return []
        with (self._control / "calls").open("a") as calls:
            calls.write(f"{operation} {mode[0]} {len(keys)}\n")
        if mode[0] == "raise":
            raise StoreUnavailable(operation, "injected by a test")
        if mode[0] == "missing":
            return [PageStatus.MISSING] * len(keys)
        if mode[0] == "delay":
            time.sleep(float(mode[1]))
        deadline_s = time.monotonic() + LONGEST_HANG_S
        while mode[0] == "hang" and self._mode(operation) == mode:
            if time.monotonic() > deadline_s:
                break
            time.sleep(0.02)
        return []


def _negate(pages: PageBatch) -> None:
    """Flip the sign of every float32 of these pages: what a pool that mixes up bytes would do."""
    for row in pages.addresses:
        for address, length in zip(row.tolist(), pages.lengths_bytes, strict=True):
            raw = np.ctypeslib.as_array((ctypes.c_uint8 * length).from_address(address))
            raw[3::4] ^= 0x80
