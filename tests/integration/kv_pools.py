# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""SGLang's KV pools on a CPU, and their memory as rows of bytes for the oracle."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool

from .oracle import ALL_RANKS, Bytes, Part

LAYERS = 2
HEADS = 2  # KV heads of the model in `launching.model_path`


class Plane(NamedTuple):
    """Memory of one part: a row of bytes per slot."""

    part: Part
    memory: Bytes


def make_kv_pool(kind: str, size: int, page_size: int, heads: int) -> Any:
    """gqa, gqa_narrow_v (Dv is not D) or mla."""
    common = {"size": size, "page_size": page_size, "layer_num": LAYERS, "device": "cpu"}
    common |= {"enable_memory_saver": False, "dtype": torch.bfloat16}
    if kind == "mla":
        return MLATokenToKVPool(kv_lora_rank=16, qk_rope_head_dim=8, **common)
    more = {"v_head_dim": 4} if kind == "gqa_narrow_v" else {}
    return MHATokenToKVPool(head_num=heads, head_dim=8, **more, **common)


def planes_of(pool: Any, heads: tuple[int, ...]) -> tuple[Plane, ...]:
    """The pool's memory, in the order in which a page is stored."""

    def plane(layer: int, name: str, buffer: torch.Tensor, heads: tuple[int, ...]) -> Plane:
        rows = buffer.view(torch.uint8).reshape(buffer.shape[0], -1).numpy()
        return Plane(Part(layer, name, heads, rows.shape[1] // len(heads)), rows)

    if isinstance(pool, MLATokenToKVPool):
        return tuple(plane(n, "kv", b, ALL_RANKS) for n, b in enumerate(pool.kv_buffer))
    parts = (("k", pool.k_buffer), ("v", pool.v_buffer))
    return tuple(
        plane(layer, name, buffers[layer], heads)
        for layer in range(LAYERS)
        for name, buffers in parts
    )
