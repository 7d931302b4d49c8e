# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Every SGLang symbol this package leans on, as data: where, what shape, why, until when.

Owns the rows; `seam` compares them with the installed SGLang. docs/design.md prints them.
"""

from __future__ import annotations

from typing import NamedTuple

from ascend_direct.integration.hooks import (
    ADMISSION,
    BEAM_SEARCH,
    DECODE_ROUND,
    ROUND,
    WEIGHT_UPDATES,
)


class Seam(NamedTuple):
    """One symbol of SGLang.

    Attributes:
        path: dotted path.
        parameters: names its signature must have, in this order; empty for classes and data.
        kind: ``contract`` (public registry or ABC), ``subclass`` (a method we extend), ``hook``
            (patched through SGLang's HookRegistry) or ``read`` (an attribute we rely on).
        why: what it is needed for.
        remove_when: the upstream change that makes it unnecessary.
    """

    path: str
    parameters: tuple[str, ...]
    kind: str
    why: str
    remove_when: str


LINKER = "sglang.srt.mem_cache.unified_cache.unified_cache_linker"
_CACHE = "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache"
_ARGS = "sglang.srt.server_args.ServerArgs"
_POOLS = "sglang.srt.mem_cache.device_pool_info"
_COLLECTORS = "sglang.srt.observability.metrics_collector"
_STAYS = "stays: public contract"
_WEIGHTS = "page hashes carry the weight version"
_PREFETCH = "SGLang asks linkers about waiting requests as it does HiCache"
_DECODE = "SGLang's decode loop serves linkers as the prefill loop does"
_POLICY = "the linker wrapper offers policy callbacks"
# Of SGLang's collectors: symbol, its parameters, what it is needed for.
_FED = (
    ("radix_cache_metric_labels", ("cache_type", "parallel"), "labels of a rank's cache"),
    ("resolve_collector_class", ("role", "default_cls"), "the user's collector, if there is one"),
    ("RadixCacheMetricsCollector.increment_load_back_num_tokens", ("num_tokens", "pool"), "loads"),
    ("RadixCacheMetricsCollector.increment_load_back_num_bytes", ("num_bytes",), "loads"),
    ("RadixCacheMetricsCollector.observe_load_back_duration", ("duration_seconds",), "loads"),
    ("StorageMetrics", ("prefetch_pgs", "backup_pgs"), "loads and stores"),
    ("StorageMetricsCollector.log_storage_metrics", ("storage_metrics",), "loads and stores"),
    ("StorageMetricsCollector.log_prefetched_tokens", ("prefetched_tokens",), "loads"),
    ("StorageMetricsCollector.log_backuped_tokens", ("backuped_tokens",), "stores"),
)

SEAMS = (
    Seam(
        "sglang.srt.plugins.hook_registry.HookRegistry.register",
        ("target", "hook", "hook_type"),
        "contract",
        "adds the flag to the argument parser",
        _STAYS,
    ),
    Seam(
        f"{_ARGS}.add_cli_args",
        ("parser",),
        "hook",
        "AFTER: the two options",
        "SGLang lets plugins declare arguments",
    ),
    Seam(
        f"{_ARGS}.from_cli_args",
        ("args",),
        "hook",
        "AROUND: the options become declared linker fields",
        "SGLang lets plugins declare arguments",
    ),
    Seam(
        "sglang.srt.arg_groups.resolution_hooks.register_resolution_hook",
        ("name",),
        "contract",
        "handle_hicache: validate the mode, select the backend",
        _STAYS,
    ),
    Seam(
        "sglang.srt.arg_groups.overrides.declare_resolution",
        ("server_args", "source"),
        "contract",
        "sets radix_cache_backend on sealed arguments",
        _STAYS,
    ),
    Seam(
        "sglang.srt.mem_cache.registry.register_radix_cache_backend",
        ("name", "factory"),
        "contract",
        "makes the cache class selectable",
        _STAYS,
    ),
    Seam(
        "sglang.srt.mem_cache.registry.create_unified_radix_cache",
        ("ctx", "cache_class"),
        "contract",
        "builds our subclass with SGLang's components and linker",
        _STAYS,
    ),
    Seam(f"{LINKER}.UnifiedCacheLinker.lookup", ("rid", "transfers"), "contract", "match", _STAYS),
    Seam(f"{LINKER}.UnifiedCacheLinker.load", ("rid", "transfers"), "contract", "load", _STAYS),
    Seam(
        f"{LINKER}.UnifiedCacheLinker.offload",
        ("transfers", "session_id"),
        "contract",
        "write-back",
        _STAYS,
    ),
    Seam(
        f"{LINKER}.UnifiedCacheLinkerWrapper._update_load",
        ("phase", "req", "component_transfers", "prefix_len"),
        "read",
        "a refused load frees what its transfer names; slots a late call may write are withheld "
        "by naming none",
        "the contract lets a linker keep slots of an abandoned load",
    ),
    Seam(
        f"{LINKER}.UnifiedCacheLinkerWrapper.has_hit",
        ("rid",),
        "read",
        "attributes pool hits to storage",
        "linker hits count as storage upstream",
    ),
    Seam(f"{_CACHE}.init_cache_linker", ("cache_linker",), "subclass", "write policy", _POLICY),
    Seam(
        f"{_CACHE}.init_load_back",
        ("params",),
        "subclass",
        "cached_tokens_details shows pool hits as storage",
        "linker hits count as storage upstream",
    ),
    Seam(
        f"{_CACHE}.check_hicache_events",
        (),
        "subclass",
        "frees withheld slots, unpins late stores, once per round on all ranks",
        _POLICY,
    ),
    Seam(
        f"{_CACHE}.finish_external_linker_loads",
        ("reqs",),
        "subclass",
        "admission cost: where the forward of a prefill batch has been launched",
        _POLICY,
    ),
    Seam(
        "sglang.srt.managers.schedule_batch.Req.extend_len",
        (),
        "read",
        "admission cost: tokens that a prefill computes",
        _POLICY,
    ),
    Seam(
        f"{_CACHE}.protected_size",
        (),
        "subclass",
        "withheld slots in SGLang's memory check",
        "the contract lets a linker keep slots of an abandoned load",
    ),
    Seam(
        f"{_CACHE}.finish",
        ("handle", "outcome"),
        "subclass",
        "hit markers of requests that never loaded are dropped",
        "SGLang clears hit markers on success",
    ),
    Seam(
        f"{_CACHE}.on_release",
        ("req", "checkpointed"),
        "subclass",
        "as finish, for requests that held slots: SGLang does not finish those",
        "SGLang clears hit markers on success",
    ),
    Seam(
        f"{_CACHE}.claim_kv_row",
        ("req",),
        "subclass",
        "as on_release, for turns of a streaming session, which keeps the slots",
        "SGLang clears hit markers on success",
    ),
    Seam(f"{_CACHE}.reset", (), "subclass", "late stores end with the tree", _POLICY),
    Seam(f"{_CACHE}.inc_lock_ref", ("node_id",), "read", "pins nodes of late stores", _POLICY),
    Seam(f"{_CACHE}.dec_lock_ref", ("node_id", "params"), "read", "unpins them", _POLICY),
    *(
        Seam(path, (), "hook", "BEFORE: pages of the old weights must not be used", _WEIGHTS)
        for path in WEIGHT_UPDATES
    ),
    Seam(
        ROUND,
        (),
        "hook",
        "BEFORE, load_mode lookahead only: the waiting queue, once per round on all ranks",
        _PREFETCH,
    ),
    Seam(
        ADMISSION,
        ("running_batch",),
        "hook",
        "AROUND, load_mode lookahead only: requests whose pages are on their way are passed over",
        _PREFETCH,
    ),
    Seam(
        f"{_CACHE}.insert",
        ("params",),
        "read",
        "lookahead: pages read ahead join the tree",
        _PREFETCH,
    ),
    Seam(
        DECODE_ROUND,
        (),
        "hook",
        "BEFORE, decode nodes only: results of stores and running answers, once per loop on all "
        "ranks",
        _DECODE,
    ),
    Seam(
        f"{_CACHE}.checkpoint",
        ("req", "up_to"),
        "read",
        "decode nodes: running answers join the tree piece by piece",
        _DECODE,
    ),
    Seam(
        "sglang.srt.managers.schedule_batch.Req.refresh_fill_ids",
        (),
        "read",
        "decode nodes: a running answer's tokens, which lag behind",
        _DECODE,
    ),
    Seam(
        "sglang.srt.disaggregation.common.conn.CommonKVManager.try_ensure_parallel_info",
        ("bootstrap_addr",),
        "read",
        "decode nodes: fills prefill_info_table, which tells prefill nodes' attention ranks",
        "SGLang tells plugins about peers",
    ),
    Seam(
        BEAM_SEARCH,
        ("req",),
        "hook",
        "AROUND: beam search is refused, as it is for HiCache",
        "SGLang refuses it for linkers too",
    ),
    Seam(
        "sglang.srt.mem_cache.utils.get_storage_hash_str",
        ("page_size",),
        "read",
        "warmed up at start: its first call compiles",
        "SGLang warms it up",
    ),
    *(
        Seam(
            f"{_COLLECTORS}.{name}",
            parameters,
            "read",
            f"--enable-metrics only: {why}",
            "SGLang counts what linkers move",
        )
        for name, parameters, why in _FED
    ),
    Seam(f"{_POOLS}.MHABufferInfo", (), "read", "page layout of GQA pools", _STAYS),
    Seam(f"{_POOLS}.MLABufferInfo", (), "read", "page layout of MLA pools", _STAYS),
)
