# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""The benchmarks' attention answers as SGLang's does, whatever part of a prompt is cached."""

from __future__ import annotations

import pytest
import torch

from scripts.sglang_cpu.attention_on_cpu.attention_on_cpu import BLOCK_TOKENS, extend

SLOTS = 2000
# Cached and new tokens of each prompt: nothing cached, all but one, more than one block.
PROMPTS = ((0, 70), (64, 1), (32, 40), (48, BLOCK_TOKENS + 30))


@pytest.mark.sglang
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # of imports
@pytest.mark.parametrize(
    ("heads", "kv_heads", "key_dim", "value_dim"),
    [(4, 2, 8, 8), (4, 4, 8, 8), (2, 1, 12, 8)],
    ids=["gqa", "mha", "mla"],
)
def test_new_tokens_are_answered_as_sglang_answers_them(
    heads: int, kv_heads: int, key_dim: int, value_dim: int
) -> None:
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    generator = torch.Generator().manual_seed(1)
    prefixes, news = (torch.tensor(column) for column in zip(*PROMPTS, strict=True))
    longest = int((prefixes + news).max())
    slots = torch.stack([torch.randperm(SLOTS, generator=generator)[:longest] for _ in PROMPTS])
    query = torch.randn(int(news.sum()), heads, key_dim, generator=generator)
    keys = torch.randn(SLOTS, kv_heads, key_dim, generator=generator)
    values = torch.randn(SLOTS, kv_heads, value_dim, generator=generator)
    rest = (keys, values, slots, torch.arange(4), prefixes + news, prefixes, news)
    options = {"scaling": 0.3, "enable_gqa": heads != kv_heads, "causal": True}
    sglang = TorchNativeAttnBackend.__new__(TorchNativeAttnBackend)
    expected = torch.full((query.shape[0], heads, value_dim), torch.nan)
    sglang._run_sdpa_forward_extend(query, expected, *rest, **options)
    got = torch.full_like(expected, torch.nan)
    extend(query, got, *rest, **options)
    torch.testing.assert_close(got, expected)


def test_what_it_cannot_do_is_refused() -> None:
    arguments = [torch.empty(0)] * 9
    with pytest.raises(NotImplementedError, match="causal self-attention"):
        extend(*arguments, causal=True, sliding_window_size=128)
