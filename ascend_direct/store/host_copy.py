# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Copies between one contiguous object and the spans of a page, in host memory.

Owns only the copying: no keys, no headers, no bounds beyond the spans given. Host addresses only.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from ascend_direct.store.base import PageBatch


class _Items:
    """Memory as overlapping items of one size: item i is the `length_bytes` bytes from base + i.

    Numpy gathers and scatters such items in one call. A span-by-span memmove gives the GIL away at
    each span, and next to a busy thread waits 5 ms to have it back: measured 1 GB/s, this way 9.
    """

    def __init__(self, base: int, last: int, length_bytes: int) -> None:
        self.__array_interface__ = {
            "version": 3,
            "data": (base, False),
            "shape": (last - base + 1,),
            "strides": (1,),
            "typestr": f"|V{length_bytes}",
        }


class HostSpans:
    """The spans of a batch, run by run: neighbouring spans of one length move together."""

    def __init__(self, pages: PageBatch) -> None:
        self._runs: list[tuple[int, Any, Any]] = []
        first = offset_bytes = 0
        for length_bytes, run in itertools.groupby(pages.lengths_bytes):
            count = len(list(run))
            addresses = pages.addresses[:, first : first + count]
            if addresses.size:
                base, last = int(addresses.min()), int(addresses.max())
                memory = np.asarray(_Items(base, last, length_bytes))
                self._runs.append((offset_bytes, memory, addresses - base))
            first += count
            offset_bytes += count * length_bytes

    def scatter(self, row: int, source: Any, skip_bytes: int) -> None:
        """Fill the spans of page `row` from the buffer `source`, past its first `skip_bytes`."""
        for offset_bytes, memory, items in self._runs:
            count, start = items.shape[1], skip_bytes + offset_bytes
            memory[items[row]] = np.frombuffer(source, memory.dtype, count, start)

    def gather(self, row: int, target: Any, skip_bytes: int) -> None:
        """Fill the buffer `target`, past its first `skip_bytes`, from the spans of page `row`."""
        for offset_bytes, memory, items in self._runs:
            count, start = items.shape[1], skip_bytes + offset_bytes
            np.frombuffer(target, memory.dtype, count, start)[:] = memory[items[row]]
