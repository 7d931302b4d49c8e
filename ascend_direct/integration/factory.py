# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Builds what the controller drives: store, layout, keys, ranks, engine; undoes it on failure.

Runs in each scheduler process, after SGLang made its KV pool.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from ascend_direct.beliefs import Beliefs
from ascend_direct.config import MIB, DirectConfig
from ascend_direct.device import Device
from ascend_direct.errors import ConfigError, LayoutError
from ascend_direct.integration.heads import HeadRange, stored_by_heads
from ascend_direct.integration.pool_layout import describe_pool, is_replicated, page_views
from ascend_direct.integration.ranks import RankGroup
from ascend_direct.integration.replicas import WHOLE, Exchange, Shard
from ascend_direct.metrics import Metrics
from ascend_direct.page_key import REPLICATED, Namespace, PageKeys, rank_part
from ascend_direct.page_layout import PageLayout
from ascend_direct.store.attach import AttachingStore
from ascend_direct.store.base import PageStore, StoreContext
from ascend_direct.store.choice import choose_store
from ascend_direct.store.packed import with_transfer
from ascend_direct.store.verified import VerifiedStore
from ascend_direct.transfer import TransferEngine, TransferLimits

# Of one step of ranks that share pages; staging takes device memory, twice as much.
EXCHANGE_BYTES = 64 * MIB


@dataclass(frozen=True)
class Parts:
    """All that a controller needs, built and started."""

    config: DirectConfig
    layout: PageLayout
    keys: PageKeys
    shard: Shard
    exchange: Exchange | None
    ranks: RankGroup
    device: Device
    engine: TransferEngine
    beliefs: Beliefs
    metrics: Metrics
    store_name: str


def build(server_args: Any, params: Any, components: Any, extra: Mapping[str, Any]) -> Parts:
    """Build and start everything for one rank.

    Args:
        server_args: SGLang's arguments, for the model's number of KV heads.
        params: SGLang's `CacheInitParams`.
        components: the radix tree's components; only the full-attention one can be served.
        extra: what `launch.resolve` handed down.

    Raises:
        ConfigError, StoreError: nothing is left open.
    """
    config = DirectConfig.load(extra["config"])
    pool = params.token_to_kv_pool_allocator.get_kvcache()
    ranks = RankGroup.of(params)
    layout = _layout(pool, params, components)
    heads = None if is_replicated(pool) else _heads(server_args, pool, ranks)
    if heads is not None:
        layout = stored_by_heads(layout, heads, config.heads_per_object)
    keys = _page_keys(extra["model"], layout, ranks, heads, params)
    shard = Shard(ranks.rank, ranks.size) if heads is None else WHOLE
    exchange = _exchange(pool, layout, params, shard, config) if shard.size > 1 else None
    device = Device.of(pool.device)
    metrics = _metrics(params, layout)
    beliefs = Beliefs(config.belief_pages, config.belief_ttl_ms / 1e3)
    store = with_transfer(choose_store(config), config.transfer, layout, device)
    store = _with_options(store, config, metrics)
    with ExitStack() as undo:
        undo.callback(store.close)
        store.open(
            StoreContext(
                device.memory, device.index, ranks.rank, layout.object_bytes, layout.regions()
            )
        )
        pages = params.token_to_kv_pool_allocator.size // params.page_size
        limits = _limits(config, pages * layout.page_bytes)
        engine = TransferEngine(store, layout, device, limits, metrics, beliefs.confirm)
        engine.start()
        undo.pop_all()
    return Parts(
        config, layout, keys, shard, exchange, ranks, device, engine, beliefs, metrics, store.name
    )


def _metrics(params: Any, layout: PageLayout) -> Metrics:
    if not params.enable_metrics:
        return Metrics()
    from ascend_direct.integration import prometheus

    sizes = layout.page_size_tokens, layout.objects_per_page
    return prometheus.of_this_rank("HiRadixCacheDirect", *sizes)


def _with_options(store: PageStore, config: DirectConfig, metrics: Metrics) -> PageStore:
    if config.on_pool_unavailable == "degrade":
        store = AttachingStore(store)
    if config.verify != "off":
        store = VerifiedStore(store, config.verify, lambda: metrics.add(loads_corrupt=1))
    return store


def _layout(pool: Any, params: Any, components: Any) -> PageLayout:
    reasons = []
    if params.disable:
        reasons.append("SGLang has switched the radix cache off for this model or mode.")
    extra = [c.name for c in components if c.name != "FULL"]
    if extra:
        reasons.append(
            f"the model keeps {', '.join(sorted(extra))} state beside its KV; only plain "
            "full-attention GQA and MLA models can be served."
        )
    if params.mtp_draft_device_pools or params.sidecar_draft_device_pools:
        reasons.append("a draft model's KV pool would not be stored: drop speculative decoding.")
    try:
        layout = describe_pool(pool, params.page_size)
    except LayoutError as error:
        reasons.append(str(error))
    if reasons:
        raise ConfigError(reasons)
    return layout


def _heads(server_args: Any, pool: Any, ranks: RankGroup) -> HeadRange:
    """Which of the model's KV heads this rank's pool holds."""
    from sglang.srt.configs.model_config import ModelConfig

    total = ModelConfig.from_server_args(server_args).get_total_num_kv_heads()
    padded = str(pool.device).startswith("cpu")
    return HeadRange.of_rank(pool.head_num, total, ranks.rank, ranks.size, padded=padded)


def _page_keys(
    model: Mapping[str, Any],
    layout: PageLayout,
    ranks: RankGroup,
    heads: HeadRange | None,
    params: Any,
) -> PageKeys:
    fields: dict[str, Any] = {
        "model": model,
        "layout": layout.digest(),
        "attention_cp_size": params.attn_cp_size,
        "kv_heads": None if heads is None else heads.total,
    }
    if heads is None:
        parts = [REPLICATED]
    elif heads.first is not None:
        parts = heads.parts(layout.objects_per_page)
    else:
        fields["attention_tp_size"] = ranks.size
        parts = [rank_part(ranks.rank, ranks.size, replicated=False)]
    return PageKeys(Namespace(fields).digest16, *parts)


def _exchange(
    pool: Any, layout: PageLayout, params: Any, shard: Shard, config: DirectConfig
) -> Exchange:
    from sglang.srt.distributed.parallel_state import get_attn_tp_group

    on_cpu = str(pool.device).startswith("cpu")
    group = params.attn_tp_cache_group if on_cpu else get_attn_tp_group().device_group
    step_bytes = min(config.batch_bytes, EXCHANGE_BYTES)
    exchange = Exchange(page_views(pool, layout), group, shard, step_bytes)
    exchange.warm_up()
    return exchange


def _limits(config: DirectConfig, pool_bytes: int) -> TransferLimits:
    return TransferLimits(
        lookup_timeout_s=config.lookup_timeout_ms / 1e3,
        load_timeout_s=config.load_timeout_ms / 1e3,
        store_timeout_s=config.store_timeout_ms / 1e3,
        # What waits to be stored is pinned: the other half stays for requests.
        store_queue_bytes=min(config.store_queue_bytes, pool_bytes // 2),
        batch_bytes=config.batch_bytes,
    )
