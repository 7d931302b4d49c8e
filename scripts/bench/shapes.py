# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Pages of real models: how many fragments of which size one page has on one rank.

The layers, heads and dimensions are those of the models' published config.json. Pages have 128
tokens, which is what SGLang's NPU back end uses, and 2-byte elements. `CURVE` has small pages, so
that thousands of them fit into memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ascend_direct.page_layout import PageLayout, Span

PAGE_TOKENS = 128
ITEM_BYTES = 2
ALIGNMENT_BYTES = 4096


@dataclass(frozen=True)
class Shape:
    """One rank's share of a model's page.

    Attributes:
        parts: per layer, (name, bytes of the fragment).
    """

    name: str
    layers: int
    parts: tuple[tuple[str, int], ...]

    @property
    def fragments(self) -> int:
        return self.layers * len(self.parts)

    @property
    def page_bytes(self) -> int:
        return self.layers * sum(size for _, size in self.parts)


def gqa(
    name: str, layers: int, kv_heads: int, head_dim: int, page_tokens: int = PAGE_TOKENS
) -> Shape:
    """K and V of each layer, `kv_heads` of them on this rank."""
    size = page_tokens * kv_heads * head_dim * ITEM_BYTES
    return Shape(name, layers, (("k", size), ("v", size)))


def mla(name: str, layers: int, lora_rank: int, rope_dim: int) -> Shape:
    """The latent and the rotary part of each layer, as the NPU pool keeps them apart; the same on
    each of any number of ranks."""
    sizes = tuple(PAGE_TOKENS * dim * ITEM_BYTES for dim in (lora_rank, rope_dim))
    return Shape(name, layers, (("latent", sizes[0]), ("rope", sizes[1])))


SHAPES = {
    shape.name: shape
    for shape in (
        gqa("qwen2.5-0.5b", layers=24, kv_heads=2, head_dim=64),
        gqa("qwen3-32b-tp8", layers=64, kv_heads=1, head_dim=128),
        gqa("qwen3-32b-tp2", layers=64, kv_heads=4, head_dim=128),
        gqa("qwen3-32b-tp1", layers=64, kv_heads=8, head_dim=128),
        mla("deepseek-r1", layers=61, lora_rank=512, rope_dim=64),
        gqa("0.5b-16-token-pages", layers=24, kv_heads=2, head_dim=64, page_tokens=16),
    )
}
CURVE = "0.5b-16-token-pages"


class Pool:
    """A KV pool in host memory with pages of one shape: one buffer per layer and part.

    Args:
        pages: pages that can be used; page 0 is padding on top, as in SGLang.
    """

    def __init__(self, shape: Shape, pages: int) -> None:
        sizes = [size for _ in range(shape.layers) for _, size in shape.parts]
        self.buffers = [_aligned((pages + 1) * size).reshape(pages + 1, size) for size in sizes]
        names = [(layer, part) for layer in range(shape.layers) for part, _ in shape.parts]
        self.layout = PageLayout(
            tuple(
                Span(layer, part, buffer.ctypes.data, buffer.shape[1], buffer.shape[1])
                for (layer, part), buffer in zip(names, self.buffers, strict=True)
            ),
            num_pages=pages + 1,
            page_size_tokens=PAGE_TOKENS,
            tag="bench",
        )

    def fill(self, rng: np.random.Generator) -> None:
        """New bytes everywhere."""
        for buffer in self.buffers:
            words = buffer.reshape(-1).view(np.uint64)
            words[:] = rng.integers(0, 2**63, words.size, np.uint64)

    def clear(self) -> None:
        """Zeros everywhere, so that a read that did nothing shows."""
        for buffer in self.buffers:
            buffer[:] = 0

    def checksum(self, pages: npt.NDArray[np.int64]) -> int:
        """Of the pages' bytes, in order."""
        total = 0
        for number, buffer in enumerate(self.buffers, 1):
            words = buffer[pages].reshape(-1).view(np.uint64)
            total = (total + number * int(np.bitwise_xor.reduce(words))) % 2**64
            total = (total + int(words[:: max(1, words.size // 997)].sum())) % 2**64
        return total


def _aligned(size_bytes: int) -> npt.NDArray[np.uint8]:
    raw = np.zeros(size_bytes + ALIGNMENT_BYTES, np.uint8)
    skip = -raw.ctypes.data % ALIGNMENT_BYTES
    return raw[skip : skip + size_bytes]
