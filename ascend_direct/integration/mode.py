# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Which server modes the cache can serve; everything else is refused before memory is taken.

Owns the list of conflicts between SGLang's options and this cache. What a KV pool must look like
is pool_layout's, what a machine must have is the store's.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

from ascend_direct.names import BACKEND


class _Conflict(NamedTuple):
    applies: Callable[[Any], bool]
    reason: str


def _truthy(variable: str) -> bool:
    return os.environ.get(variable, "").strip().lower() in {"1", "true", "yes", "on"}


# Each with what to do. The order is the order in which an operator reads them.
_CONFLICTS = (
    _Conflict(
        lambda a: (
            a.disaggregation_mode == "decode" and not a.disaggregation_decode_enable_radix_cache
        ),
        "a decode node keeps no radix cache: add --disaggregation-decode-enable-radix-cache (the "
        "command line adds it by itself; Engine does not).",
    ),
    _Conflict(
        lambda a: a.disable_radix_cache,
        "the radix cache is off: drop --disable-radix-cache (a model or mode may imply it).",
    ),
    _Conflict(
        lambda a: a.radix_cache_backend not in (None, BACKEND),
        "--radix-cache-backend selects another cache: drop it.",
    ),
    _Conflict(
        lambda a: a.enable_hierarchical_cache,
        "--enable-hierarchical-cache (HiCache) adds the host tier this cache replaces: drop it.",
    ),
    _Conflict(
        lambda a: a.hicache_storage_backend is not None,
        "--hicache-storage-backend belongs to HiCache: drop it; the pool is set up through "
        "--hierarchical-cache-direct-config.",
    ),
    _Conflict(lambda a: a.enable_lmcache, "--enable-lmcache is another prefix cache: drop it."),
    _Conflict(lambda a: a.enable_flexkv, "--enable-flexkv is another prefix cache: drop it."),
    _Conflict(
        lambda a: a.enable_linker_mla_dedup,
        "--enable-linker-mla-dedup works with the Mooncake linker only: drop it.",
    ),
    _Conflict(
        lambda a: a.pp_size > 1,
        "--pp-size > 1: SGLang does not carry linker decisions across pipeline stages; use TP.",
    ),
    _Conflict(
        lambda a: a.dcp_size > 1,
        "--dcp-size > 1 spreads one page over ranks, which stored pages do not describe; use 1.",
    ),
    _Conflict(
        lambda a: a.enable_pd_role_switch,
        "--enable-pd-role-switch: a node is linked as what it is at start; drop it.",
    ),
    _Conflict(
        lambda a: a.encoder_only,
        "--encoder-only computes no KV: drop it, or run without the cache.",
    ),
    _Conflict(lambda a: a.use_ray, "--use-ray has not been tested with a linked pool: drop it."),
    _Conflict(
        lambda a: a.disaggregation_decode_retraction_backup == "host_pool",
        "--disaggregation-decode-retraction-backup host_pool would build a host pool and silently "
        "replace this cache: choose none or cpu_tensor.",
    ),
    _Conflict(
        lambda a: a.disaggregation_decode_enable_offload_kvcache,
        "--disaggregation-decode-enable-offload-kvcache needs HiCache: drop it.",
    ),
    _Conflict(lambda a: a.enable_hisparse, "--enable-hisparse keeps KV elsewhere: drop it."),
    _Conflict(
        lambda a: _truthy("SGLANG_NPU_ENABLE_SPARSE_KV_OFFLOAD"),
        "SGLANG_NPU_ENABLE_SPARSE_KV_OFFLOAD takes the KV buffers away: unset it.",
    ),
    _Conflict(
        lambda a: a.enable_kv_cache_sharding,
        "--enable-kv-cache-sharding spreads layers of one page over ranks: drop it.",
    ),
    _Conflict(
        lambda a: a.enable_unified_memory or a.enable_page_major_kv_layout,
        "--enable-unified-memory / --enable-page-major-kv-layout interleave pools: drop them.",
    ),
    _Conflict(
        lambda a: a.speculative_algorithm is not None,
        "--speculative-algorithm: the draft model's KV would not be stored, and restored prefixes "
        "would lower its acceptance: drop it.",
    ),
    _Conflict(
        lambda a: a.dllm_algorithm is not None,
        "--dllm-algorithm: diffusion models rewrite KV in place: drop it.",
    ),
    _Conflict(
        lambda a: a.enable_session_radix_cache,
        "--enable-session-radix-cache has not been tested with a linked pool: drop it.",
    ),
    _Conflict(
        lambda a: a.enable_memory_saver,
        "--enable-memory-saver unmaps KV memory that a pool call may still be using: drop it.",
    ),
    _Conflict(
        lambda a: a.prefill_only_disable_kv_cache,
        "--prefill-only-disable-kv-cache leaves no KV to store: drop it.",
    ),
    _Conflict(
        lambda a: str(a.kv_cache_dtype).startswith(("fp4", "mxfp", "nvfp", "int")),
        "--kv-cache-dtype with scale buffers is not supported: use auto, bfloat16, fp8_e4m3 or "
        "fp8_e5m2.",
    ),
)


def conflicts(args: Any) -> list[str]:
    """Every reason why this server cannot run the cache.

    Args:
        args: SGLang's server arguments as resolved so far (attributes by their field names).
    """
    return [conflict.reason for conflict in _CONFLICTS if conflict.applies(args)]
