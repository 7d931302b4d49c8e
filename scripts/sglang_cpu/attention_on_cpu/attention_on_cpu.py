# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Lets SGLang's `torch_native` attention compute the new tokens of a prompt only, for benchmarks.

SGLang 0.5.23's fills up the queries to the whole prompt and throws the cached part's answers away:
a cache hit then costs as much attention as a cold prompt, which no NPU's kernel does. Owns this one
step, for every system of a benchmark alike, and acts only when SGLANG_CPU_ATTENTION=new_tokens.
Causal self-attention of decoder models; no sliding window. No part of `ascend_direct`.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

# Queries per call: those of a block do not look at the keys behind it, which a mask would compute.
BLOCK_TOKENS = 512


def register() -> None:
    """Entry point; SGLang calls it in every process it starts."""
    if os.environ.get("SGLANG_CPU_ATTENTION") != "new_tokens":
        return
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    register_attention_backend("torch_native")(_make)


def _make(runner: Any) -> Any:
    # Imported here: register() runs before SGLang may load its layers.
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    class NewTokensAttention(TorchNativeAttnBackend):  # type: ignore[misc]
        """SGLang's, except for a prompt whose beginning is cached."""

        def _run_sdpa_forward_extend(self, *args: Any, **options: Any) -> torch.Tensor:
            return extend(*args, **options)

    return NewTokensAttention(runner)


def extend(
    query: torch.Tensor,
    output: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    extend_prefix_lens: torch.Tensor,
    extend_seq_lens: torch.Tensor,
    encoder_lens: torch.Tensor | None = None,
    scaling: float | None = None,
    enable_gqa: bool = False,
    causal: bool = False,
    is_cross_attn: bool = False,
    sliding_window_size: int | None = None,
) -> torch.Tensor:
    """Attention of new tokens to all before them; arguments as SGLang passes them.

    Args:
        query: [new tokens of all prompts, heads, head size].
        output: as query, or with V's head size; filled.
        k_cache: [slots, KV heads, head size]; v_cache alike.
        req_to_token: [requests, positions], the slot of each token.

    Raises:
        NotImplementedError: not the causal self-attention of a decoder.
    """
    if encoder_lens is not None or is_cross_attn or not causal or sliding_window_size is not None:
        raise NotImplementedError("new_tokens attention is causal self-attention of a decoder")
    begin = 0
    lengths = zip(
        req_pool_indices.tolist(),
        seq_lens.tolist(),
        extend_prefix_lens.tolist(),
        extend_seq_lens.tolist(),
        strict=True,
    )
    for request, total, prefix, new in lengths:
        slots = req_to_token[request, :total]
        keys, values = k_cache[slots].transpose(0, 1), v_cache[slots].transpose(0, 1)
        rows = slice(begin, begin + new)
        _attend(query[rows], output[rows], keys, values, prefix, scaling, enable_gqa)
        begin += new
    return output


def _attend(
    query: torch.Tensor,
    output: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    prefix: int,
    scaling: float | None,
    enable_gqa: bool,
) -> None:
    """One prompt: query, output [new tokens, heads, size]; keys, values [heads, all, size]."""
    for first in range(0, len(query), BLOCK_TOKENS):
        block = slice(first, min(first + BLOCK_TOKENS, len(query)))
        count = block.stop - first
        seen = prefix + block.stop
        answer = scaled_dot_product_attention(
            query[block].transpose(0, 1).unsqueeze(0),
            keys[None, :, :seen].to(query.dtype),
            values[None, :, :seen].to(query.dtype),
            attn_mask=torch.ones(count, seen, dtype=torch.bool).tril(seen - count),
            scale=scaling,
            enable_gqa=enable_gqa,
        )
        output[block] = answer.squeeze(0).transpose(0, 1)
