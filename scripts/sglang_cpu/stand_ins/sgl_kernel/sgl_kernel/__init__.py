# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""The part of sglang-kernel that SGLang 0.5.23 needs in order to start on a CPU.

The real package needs CUDA's runtime compiler to be imported. Registers no operator on purpose:
without `torch.ops.sgl_kernel` every layer of SGLang takes its plain torch path.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch

__version__ = "0.4.10+stand.in"


def assign_req_to_token_pool_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,
) -> None:
    """Write the slots of each request's new tokens, laid end to end, into its row of the table."""
    first = 0
    bounds = zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True)
    for row, start, end in bounds:
        last = first + end - start
        req_to_token[row, start:end] = out_cache_loc[first:last].to(req_to_token.dtype)
        first = last


def __getattr__(name: str) -> Callable[..., NoReturn]:
    # SGLang imports a dozen CPU kernels at module level, for speculative decoding and linear
    # attention; which ones changes often, and none is called without those features.
    if not name.endswith("_cpu"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"{name}: the stand-in for sglang-kernel has no such kernel")

    return refuse
