# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Starts SGLang with what its HiCache lacks on a CPU, and changes nothing else of it.

SGLang 0.5.23 has no host <-> device copy operators for the CPU (they are in sgl_kernel), pins host
memory through CUDA, waits on streams, of which torch.cpu has a stand-in without `synchronize`, and
leaves 10 GiB of host memory alone, which a small machine may not have. With a Mooncake process that
stores for it, it registers K and V of its host memory one by one, where Mooncake knows one buffer,
and gives up. Owns these five things. The copies are those of `--hicache-io-backend direct` with the
layout `page_first_direct`: one torch copy per layer, part and run of neighbouring pages, straight
from the source to its place, with nothing in between: HiCache must not look slow through us.

SGLang's scheduler is a spawned process: it imports this module again, so the top level acts there.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch


def page_runs(
    sources: torch.Tensor, targets: torch.Tensor, page_size: int
) -> Iterator[tuple[int, int, int]]:
    """(first source page, first target page, pages) of runs that are neighbours on both sides.

    Args:
        sources: token slots, whole pages in a row, int64 on the CPU.
        targets: as many token slots.
    """
    source_pages = sources[::page_size] // page_size
    target_pages = targets[::page_size] // page_size
    breaks = (source_pages.diff() != 1) | (target_pages.diff() != 1)
    starts = [0, *(breaks.nonzero().flatten() + 1).tolist(), len(source_pages)]
    for start, end in pairwise(starts):
        if end > start:
            yield int(source_pages[start]), int(target_pages[start]), end - start


def _as_pages(slots: torch.Tensor, page_size: int) -> torch.Tensor:
    """[slots, ...] as [pages, page_size, ...], without a copy."""
    return slots.view(-1, page_size, *slots.shape[1:])


def transfer_kv_per_layer_direct_pf_lf(
    src_ptrs: Sequence[torch.Tensor],
    dst_ptrs: Sequence[torch.Tensor],
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    layer_id: int,
    page_size: int,
) -> None:
    """Host [page, layer, token, ...] to one layer's device buffers [slot, ...]."""
    runs = list(page_runs(src_indices, dst_indices, page_size))
    for host, device in zip(src_ptrs, dst_ptrs, strict=True):
        pages = _as_pages(device, page_size)
        for source, target, count in runs:
            pages[target : target + count].copy_(host[source : source + count, layer_id])


def transfer_kv_all_layer_direct_lf_pf(
    src_ptrs: Sequence[torch.Tensor],
    dst_ptrs: Sequence[torch.Tensor],
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    page_size: int,
) -> None:
    """All layers' device buffers (K of every layer, then V) to the host pages of each part."""
    runs = list(page_runs(src_indices, dst_indices, page_size))
    layers = len(src_ptrs) // len(dst_ptrs)
    for number, device in enumerate(src_ptrs):
        host, layer = dst_ptrs[number // layers], number % layers
        pages = _as_pages(device, page_size)
        for source, target, count in runs:
            host[target : target + count, layer].copy_(pages[source : source + count])


def _allocate(
    dims: Any, dtype: Any, device: str, pin_memory: bool, allocator: Any, *_: Any, **__: Any
) -> torch.Tensor:
    """Plain host memory: there is no device that it would have to be pinned for."""
    buffer: torch.Tensor = allocator.allocate(dims, dtype=dtype, device=device)
    return buffer


def _synchronize(stream: Any) -> None:
    """Nothing runs behind the caller's back on a CPU."""


def _host_buffers(host_pool: Any) -> list[torch.Tensor]:
    """What Mooncake has mapped: the whole buffer, of which K and V are the halves."""
    return [host_pool.kv_buffer]


def supply() -> None:
    """Put what is missing where SGLang looks for it."""
    from sglang.srt.mem_cache.pool_host import base, common, mha, mla
    from sglang.srt.mem_cache.storage.mooncake_store.mooncake_store import MooncakeStore

    operators = (transfer_kv_per_layer_direct_pf_lf, transfer_kv_all_layer_direct_lf_pf)
    for operator in operators:
        for module in (mha, mla):
            setattr(module, operator.__name__, operator)
    common.ALLOC_MEMORY_FUNCS["cpu"] = _allocate
    base.HICACHE_HOST_MEMORY_RESERVE_BYTES = 0
    torch.cpu.Stream.synchronize = _synchronize
    MooncakeStore._iter_host_pool_buffers = staticmethod(_host_buffers)


if __name__ in ("__main__", "__mp_main__"):
    supply()

if __name__ == "__main__":
    from sglang.launch_server import run_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args

    load_plugins()
    run_server(prepare_server_args(sys.argv[1:]))
