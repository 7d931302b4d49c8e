# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Packing pages in device memory: the option `transfer`, on NPUs and GPUs.

Owns how pages become few launches of the kernel, on a stream of its own, so that a running forward
is neither waited for nor delayed. The kernel itself is copy_fragments.py. The counterpart of
page_packer.HostBlock; not run on an NPU yet.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ascend_direct.page_layout import Addresses, Region
from ascend_direct.store.base import PageBatch

# Of 192 KiB unified buffer: two of these, since the compiler overlaps one tile's load with the
# store of the one before.
NPU_TILE_BYTES = 64 * 1024
# A GPU keeps a tile in registers.
GPU_TILE_BYTES = 16 * 1024
# Programs of a launch; each loops. The vector cores of an A2; a GPU wants a few for each SM.
NPU_PROGRAMS = 40
GPU_PROGRAMS_PER_SM = 8
WORD_BYTES = 4


class Run(NamedTuple):
    """Fragments of a page that lie equally far apart: those of one part, one for each layer.

    Attributes:
        first: number of the first of them in a page.
        fragments: how many.
        step_bytes: from one to the next.
        length_bytes: of each.
        offset_bytes: of the first in a packed page.
    """

    first: int
    fragments: int
    step_bytes: int
    length_bytes: int
    offset_bytes: int


def runs(addresses: Addresses, lengths_bytes: Sequence[int]) -> list[Run]:
    """Cut the fragments of pages into as few runs as their addresses allow.

    Args:
        addresses: int64 [pages, fragments], at least one of each.
    """
    steps = np.diff(addresses, axis=1)
    uniform = (steps == steps[:1]).all(axis=0).tolist()
    found, first, offset_bytes = [], 0, 0
    while first < len(lengths_bytes):
        last, length_bytes = first, lengths_bytes[first]
        while (
            last + 1 < len(lengths_bytes)
            and lengths_bytes[last + 1] == length_bytes
            and uniform[last]
            and steps[0, last] == steps[0, first]
        ):
            last += 1
        count = last + 1 - first
        step_bytes = int(steps[0, first]) if count > 1 else 0
        found.append(Run(first, count, step_bytes, length_bytes, offset_bytes))
        first, offset_bytes = last + 1, offset_bytes + count * length_bytes
    return found


class Launches(NamedTuple):
    """What the kernel is launched with, once for each run, to copy some pages.

    Attributes:
        base: address that `starts` count from.
        element_bytes: what everything below is counted in.
        starts: int64 [runs, rows], where the first fragment of each run begins.
        places: int64 [rows], which page of the block a row is.
        counts: of each run, the kernel's arguments from `rows` to `offset`.
    """

    base: int
    element_bytes: int
    starts: npt.NDArray[np.int64]
    places: npt.NDArray[np.int64]
    counts: Sequence[tuple[int, ...]]


def launches(pages: PageBatch, rows: Sequence[int]) -> Launches:
    """How to copy `rows` of `pages`, at least one: in words if all of them are aligned."""
    places = np.array(rows, np.int64)
    addresses = pages.addresses[places]
    found, base = runs(addresses, pages.lengths_bytes), int(addresses.min())
    aligned = not (addresses % WORD_BYTES).any() and not np.any(
        np.array(pages.lengths_bytes) % WORD_BYTES
    )
    size = WORD_BYTES if aligned else 1
    starts = np.ascontiguousarray(addresses[:, [run.first for run in found]].T - base) // size
    counts = [
        (
            *(len(places), run.fragments, run.step_bytes // size, run.length_bytes // size),
            *(pages.page_bytes // size, run.offset_bytes // size),
        )
        for run in found
    ]
    return Launches(base, size, starts, places, counts)


@dataclass(frozen=True)
class _Memory:
    """What Triton takes for a tensor: device memory from an address on."""

    address: int
    dtype: Any

    def data_ptr(self) -> int:
        return self.address


class Accelerator:
    """A device as a block needs it.

    Args:
        kind: torch device type.
        index: local device number.

    Attributes:
        programs: of a launch.
        tile_bytes: that a program moves at once.
    """

    def __init__(self, kind: str, index: int) -> None:
        import torch

        self.device = torch.device(kind, index)
        self._module = torch.get_device_module(kind)
        self._stream = self._module.Stream(device=self.device)
        self.programs, self.tile_bytes = NPU_PROGRAMS, NPU_TILE_BYTES
        if kind != "npu":
            properties = self._module.get_device_properties(index)
            self.programs = GPU_PROGRAMS_PER_SM * properties.multi_processor_count
            self.tile_bytes = GPU_TILE_BYTES

    @contextlib.contextmanager
    def stream(self) -> Iterator[None]:
        """What is launched within has ended when this is left, also by an exception: who takes the
        memory next does not ask."""
        with self._module.device(self.device.index), self._module.stream(self._stream):
            try:
                yield
            finally:
                self._stream.synchronize()

    def memory(self, address: int, dtype: Any) -> Any:
        """Device memory from an address on, as the kernel takes it."""
        return _Memory(address, dtype)


class DeviceBlock:
    """A block in device memory.

    Args:
        size_bytes: of the block.

    Raises:
        ImportError: Triton is not installed.
        RuntimeError: there is no device memory for the block.
    """

    def __init__(self, size_bytes: int, accelerator: Accelerator) -> None:
        import torch

        from ascend_direct.store.copy_fragments import copy_fragments

        self._kernel, self._accelerator, self._torch = copy_fragments, accelerator, torch
        with accelerator.stream():  # else the zeros might come after the first page
            self._bytes = torch.zeros(size_bytes, dtype=torch.uint8, device=accelerator.device)
        self.region = Region(self._bytes.data_ptr(), size_bytes)

    def pack(self, pages: PageBatch) -> None:
        self._copy(pages, range(len(pages)), pack=True)

    def unpack(self, pages: PageBatch, rows: Sequence[int]) -> None:
        self._copy(pages, rows, pack=False)

    def _copy(self, pages: PageBatch, rows: Sequence[int], *, pack: bool) -> None:
        if not len(rows):
            return
        base, size, *arrays, counts = launches(pages, rows)
        dtype = self._torch.int32 if size == WORD_BYTES else self._torch.uint8
        memory = self._accelerator.memory(base, dtype)
        block = self._bytes[: self._bytes.numel() // size * size].view(dtype)
        with self._accelerator.stream():
            starts, places = (
                self._torch.from_numpy(array).to(self._accelerator.device) for array in arrays
            )
            for first, numbers in zip(starts, counts, strict=True):
                self._kernel[(self._accelerator.programs,)](
                    *(memory, block, first, places, *numbers),
                    PACK=pack,
                    TILE=self._accelerator.tile_bytes // size,
                )
