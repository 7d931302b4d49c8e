# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Packing pages in device memory: the option `transfer`, on NPUs and GPUs.

Owns how pages become few launches of the kernel, on a stream of its own, so that a running forward
is neither waited for nor delayed. The kernel itself is copy_fragments.py. The counterpart of
page_packer.HostBlock; not run on an NPU yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ascend_direct.errors import ConfigError
from ascend_direct.page_layout import Addresses, Region
from ascend_direct.store.base import PageBatch

# Programs of a launch; each loops. The vector cores of an A2; a GPU wants a few for each SM.
NPU_PROGRAMS = 40
GPU_PROGRAMS_PER_SM = 8
_WORD_BYTES = 4


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


@dataclass(frozen=True)
class _Memory:
    """What Triton takes for a tensor: device memory from an address on."""

    address: int
    dtype: Any

    def data_ptr(self) -> int:
        return self.address


class DeviceBlock:
    """A block in device memory.

    Args:
        size_bytes: of the block.
        kind: torch device type.
        index: local device number.

    Raises:
        ConfigError: Triton is not installed, or there is no device memory for the block.
    """

    def __init__(self, size_bytes: int, kind: str, index: int) -> None:
        import torch

        try:
            from ascend_direct.store.copy_fragments import copy_fragments, tile_elements

            self._torch, self._device = torch, torch.device(kind, index)
            self._bytes = torch.zeros(size_bytes, dtype=torch.uint8, device=self._device)
        except (ImportError, RuntimeError) as error:  # RuntimeError: out of memory
            raise ConfigError(
                [f"pages cannot be packed on {kind}:{index} ({error}): set transfer to scatter."]
            ) from error
        self._kernel, self._tile_elements = copy_fragments, tile_elements
        self._module = torch.get_device_module(kind)
        self._stream = self._module.Stream(device=self._device)
        self._programs = NPU_PROGRAMS
        if kind != "npu":
            properties = self._module.get_device_properties(index)
            self._programs = GPU_PROGRAMS_PER_SM * properties.multi_processor_count
        self.region = Region(self._bytes.data_ptr(), size_bytes)

    def pack(self, pages: PageBatch) -> None:
        self._launch(pages, list(range(len(pages))), pack=True)

    def unpack(self, pages: PageBatch, rows: Sequence[int]) -> None:
        self._launch(pages, rows, pack=False)

    def _launch(self, pages: PageBatch, rows: Sequence[int], *, pack: bool) -> None:
        """One launch for each run, then wait: the pool reads or reuses the memory next."""
        addresses = pages.addresses[list(rows)]
        found = runs(addresses, pages.lengths_bytes)
        words = (
            all(n % _WORD_BYTES == 0 for n in pages.lengths_bytes)
            and not (addresses % _WORD_BYTES).any()
        )
        size, dtype = (_WORD_BYTES, self._torch.int32) if words else (1, self._torch.uint8)
        base = int(addresses.min())
        firsts = np.ascontiguousarray(addresses[:, [run.first for run in found]].T - base) // size
        with self._module.stream(self._stream):
            starts = self._torch.from_numpy(firsts).to(self._device)
            places = self._torch.tensor(list(rows), dtype=self._torch.int64).to(self._device)
            memory, block = _Memory(base, dtype), self._bytes[: self._bytes.numel() // size * size]
            for run, first in zip(found, starts, strict=True):
                self._kernel[(self._programs,)](
                    *(memory, block.view(dtype), first, places, len(rows), run.fragments),
                    *(n // size for n in (run.step_bytes, run.length_bytes, pages.page_bytes)),
                    run.offset_bytes // size,
                    PACK=pack,
                    TILE=self._tile_elements(size, npu=self._device.type == "npu"),
                )
            self._stream.synchronize()
