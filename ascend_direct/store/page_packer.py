# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Packing pages in host memory: the option `transfer`.

Owns the call into the native code of kernels/page_packing, which setup.py builds where there is a
C++ compiler. Does not own when pages are packed (packed.py), nor device memory
(device_page_packer.py).
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ascend_direct.config import MIB
from ascend_direct.errors import ConfigError, StoreUnavailable
from ascend_direct.page_layout import Region
from ascend_direct.store.base import PageBatch

LIBRARY = "ascend_direct.store._page_packing"
# DMA engines and registration want whole memory pages.
_ALIGNMENT_BYTES = 2 * MIB


class Block(Protocol):
    """Contiguous memory for some pages, and the way between it and the pages' fragments."""

    region: Region

    def pack(self, pages: PageBatch) -> None:
        """Row i of `pages` becomes the i-th page of the block; done when this returns."""

    def unpack(self, pages: PageBatch, rows: Sequence[int]) -> None:
        """Fill the fragments of `rows` from those pages of the block; done when this returns."""


class HostBlock:
    """A block in host memory.

    Args:
        size_bytes: of the block.
        threads: that share one call.

    Raises:
        ConfigError: the native code was not built.
    """

    def __init__(self, size_bytes: int, threads: int = 1) -> None:
        self._move = native_library().ad_move_pages
        self._threads = threads
        memory = np.zeros(size_bytes + _ALIGNMENT_BYTES, np.uint8)
        skip_bytes = -memory.ctypes.data % _ALIGNMENT_BYTES
        self.bytes = memory[skip_bytes : skip_bytes + size_bytes]
        self.region = Region(self.bytes.ctypes.data, size_bytes)

    def pack(self, pages: PageBatch) -> None:
        self._call(pages, np.arange(len(pages)), to_block=True)

    def unpack(self, pages: PageBatch, rows: Sequence[int]) -> None:
        self._call(pages, np.asarray(rows, np.int64), to_block=False)

    def _call(self, pages: PageBatch, rows: npt.NDArray[np.int64], *, to_block: bool) -> None:
        addresses = np.ascontiguousarray(pages.addresses[rows], np.int64)
        lengths = np.array(pages.lengths_bytes, np.int64)
        places = np.ascontiguousarray(rows, np.int64)
        code = self._move(
            addresses.ctypes.data,
            lengths.ctypes.data,
            places.ctypes.data,
            *addresses.shape,
            self.region.address,
            to_block,
            self._threads,
        )
        if code:
            raise StoreUnavailable("pack", "no memory for a list of offsets", int(code))


def native_library() -> ctypes.CDLL:
    """The native code.

    Raises:
        ConfigError: it was not built, or cannot be loaded.
    """
    found = importlib.util.find_spec(LIBRARY)
    try:
        if found is None or found.origin is None:
            raise OSError("not built: there was no C++ compiler at installation")
        library = ctypes.CDLL(found.origin)
    except OSError as error:
        reason = (
            f"pages in host memory cannot be packed ({error}): set transfer to scatter, or "
            "install a C++ compiler and ascend_direct again."
        )
        raise ConfigError([reason]) from error
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.ad_move_pages.argtypes = (
        *(pointer, pointer, pointer, number, number, pointer),
        *(ctypes.c_int, ctypes.c_int),
    )
    return library
