# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""SGLang's Ascend KV pools on a machine without torch_npu.

Owns what it takes to build `NPUMHATokenToKVPool` and `NPUMLATokenToKVPool` on CPU tensors and to
write tokens through them: SGLang's platform flag, and the two scatter operators those writes call,
as torch_npu documents them. Buffers, shapes and addresses are SGLang's own code. Nothing that runs
on this is an NPU result.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any
from unittest import mock


@contextlib.contextmanager
def ascend_pools(dcp_size: int = 1) -> Iterator[Any]:
    """SGLang's Ascend pool module, usable on a CPU inside this block.

    Args:
        dcp_size: ranks over which decode context parallelism splits the slots.
    """
    import sglang.srt.hardware_backend.npu.memory_pool_npu as npu_pools
    import sglang.srt.mem_cache.memory_pool as pools
    from sglang.srt.runtime_context import get_parallel

    operators = types.SimpleNamespace(
        npu_scatter_nd_update_=_scatter_nd_update,
        _npu_reshape_and_cache=_reshape_and_cache,
    )
    with (
        # Read when a pool is built: on Ascend the base class leaves pointer tables and scales out.
        mock.patch.object(pools, "_is_npu", True),
        mock.patch.object(npu_pools, "torch_npu", operators, create=True),
        # No server has published its parallel layout in a test process.
        get_parallel().override(attn_dcp_size=dcp_size, attn_dcp_rank=0),
    ):
        yield npu_pools


def _scatter_nd_update(target: Any, indices: Any, updates: Any) -> None:
    target[indices[:, 0].long()] = updates


def _reshape_and_cache(
    key: Any, value: Any, key_cache: Any, value_cache: Any, slot_indices: Any
) -> None:
    for cache, tokens in ((key_cache, key), (value_cache, value)):
        cache.view(-1, *cache.shape[2:])[slot_indices.long()] = tokens
