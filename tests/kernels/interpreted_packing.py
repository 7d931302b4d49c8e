# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""A program: DeviceBlock on a CPU, its kernel run by Triton's interpreter, against the reference.

Owns what stands in for the device (no stream, and memory at an address that the interpreter takes)
and the layouts. Launches, their arguments and the kernel are the product's. A program of its own
because .venv has a stand-in where Triton would be: test_copy_fragments.py starts it beside Triton.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ascend_direct.store.base import PageBatch
from ascend_direct.store.device_page_packer import DeviceBlock
from kernels.page_packing import reference
from tests.contract.store_contract import Arena

GUARD, GUARD_BYTES = 0xA5, 61
GIB = 1 << 30


@dataclass(frozen=True)
class HostMemory:
    """Host memory from an address on; the interpreter works in place."""

    address: int
    dtype: torch.dtype
    device: str = "cpu"

    def data_ptr(self) -> int:
        return self.address

    def cpu(self) -> HostMemory:
        return self

    def to(self, device: str) -> HostMemory:
        return self

    @property
    def data(self) -> HostMemory:
        return self

    def copy_(self, other: HostMemory) -> None:
        assert other is self


class Interpreter:
    """What ascend_direct's Accelerator is to a block; three programs share a launch."""

    device = torch.device("cpu")
    programs = 3

    def __init__(self, tile_bytes: int) -> None:
        self.tile_bytes = tile_bytes

    def stream(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def memory(self, address: int, dtype: torch.dtype) -> HostMemory:
        return HostMemory(address, dtype)


@dataclass(frozen=True)
class Layout:
    """Pages in some memory.

    Attributes:
        memory: uint8, all fragments lie in it.
        seen: the parts of it that are compared; together they hold all fragments, with room around.
    """

    memory: np.ndarray
    pages: PageBatch
    seen: Sequence[slice] = (slice(None),)

    def look(self) -> list[bytes]:
        return [self.memory[part].tobytes() for part in self.seen]


def anywhere(rng: np.random.Generator) -> Layout:
    """Fragments of any lengths at any places: many runs; in words or in bytes."""
    unit = int(rng.choice([1, 4]))
    lengths = rng.choice([1, 3, 16, 64, 100, 255, 256, 257, 1000], rng.integers(1, 7)) * unit
    arena = Arena(1 << 16, unit)
    pages = arena.place(int(rng.integers(1, 6)), lengths.tolist(), rng)
    return Layout(arena.bytes, pages)


def layer_by_layer(rng: np.random.Generator) -> Layout:
    """As KV pools lie: each layer of each part has all pages, of which the batch has some."""
    layers, slots = int(rng.integers(2, 6)), int(rng.integers(1, 9))
    parts = rng.choice([4, 60, 64, 65, 129, 512, 1152], rng.integers(1, 4)).tolist()
    some = rng.permutation(slots)[: rng.integers(1, slots + 1)]
    begins, lengths, end = [], [], GUARD_BYTES + 3
    for length in parts:
        for _ in range(layers):
            begins.append(end + some * length)
            lengths.append(length)
            end += slots * length
    memory = np.zeros(end + GUARD_BYTES, np.uint8)
    addresses = np.array(begins, np.int64).T + memory.ctypes.data
    return Layout(memory, PageBatch(addresses, tuple(lengths)))


def far_apart(rng: np.random.Generator) -> Layout:
    """Fragments more than 2^31 words apart; the memory is never touched in between."""
    length, pages, step = int(rng.choice([252, 255])), 3, 9 * GIB
    file = os.memfd_create("far_apart")
    os.ftruncate(file, 3 * step)
    memory = np.frombuffer(mmap.mmap(file, 3 * step), np.uint8)
    os.close(file)
    offsets = 4096 + np.arange(3)[None] * step + rng.permutation(pages)[:, None] * length
    seen = [slice(layer * step, layer * step + 8192) for layer in range(3)]
    return Layout(memory, PageBatch(offsets + memory.ctypes.data, (length,) * 3), seen)


KINDS = (anywhere, layer_by_layer, anywhere, layer_by_layer, far_apart)


def compare(layout: Layout, rng: np.random.Generator, tile_bytes: int) -> None:
    """Pack, then unpack other bytes, and compare every byte that could have been written."""
    memory, pages = layout.memory, layout.pages
    for part in layout.seen:
        memory[part] = np.frombuffer(rng.bytes(memory[part].size), np.uint8)
    before, lengths = layout.look(), pages.lengths_bytes
    tensor, starts = torch.from_numpy(memory), torch.from_numpy(pages.addresses - _begin(memory))
    packed_bytes = len(pages) * pages.page_bytes
    block = DeviceBlock(packed_bytes + GUARD_BYTES, Interpreter(tile_bytes))  # type: ignore
    held = np.frombuffer(
        (ctypes.c_ubyte * block.region.length_bytes).from_address(block.region.address), np.uint8
    )

    held[:] = GUARD
    block.pack(pages)
    assert (held[:packed_bytes] == reference.pack(tensor, starts, lengths).numpy().ravel()).all()
    assert (held[packed_bytes:] == GUARD).all(), "pack wrote past the pages"
    assert layout.look() == before, "pack wrote to a page"

    held[:] = np.frombuffer(rng.bytes(held.size), np.uint8)
    rows = rng.permutation(len(pages))[: rng.integers(0, len(pages) + 1)].tolist()
    block.unpack(pages, rows)
    unpacked = layout.look()
    for part, content in zip(layout.seen, before, strict=True):
        memory[part] = np.frombuffer(content, np.uint8)
    page_rows = torch.from_numpy(held[:packed_bytes].reshape(len(pages), -1).copy())
    reference.unpack(page_rows[rows], tensor, starts[rows], lengths)
    assert unpacked == layout.look(), f"unpack of rows {rows}"


def _begin(memory: np.ndarray) -> int:
    return int(memory.ctypes.data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layouts", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for number in range(options.layouts):
        rng = np.random.default_rng([options.seed, number])
        kind = KINDS[number % len(KINDS)]
        # 64 KiB is what an NPU is given; small tiles make the loops long.
        tile_bytes = int(rng.choice([64, 256, 1024, 64 * 1024]))
        try:
            compare(kind(rng), rng, tile_bytes)
        except Exception as error:
            raise SystemExit(
                f"layout {number} of seed {options.seed} ({kind.__name__}, tiles of {tile_bytes} "
                f"bytes): {error!r}"
            ) from error
    print(f"{options.layouts} layouts agree")


if __name__ == "__main__":
    main()
