# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""What `--enable-metrics` exports of this cache, on SGLang's own /metrics endpoint.

Owns names, help texts and buckets, feeds prometheus_client, and SGLang's collectors of HiCache
where they fit: its linker path feeds neither. What is counted is `metrics`'s; how many prompt
tokens came from the pool is SGLang's `sglang:cached_tokens_total` with `cache_source="storage"`,
which hits of this cache feed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ascend_direct.metrics import LEVELS, NAMES, Metrics

PREFIX = "ascend_direct_"
STORAGE = "ascend_direct"
_US = 1e-6
# From a hit of a few pages in host memory to the default load_timeout_ms; stores may take longer.
_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
# What only the cache can tell → what it is.
CACHE_LEVELS = {
    "store_queue_jobs": "Stores queued, running or to be reported; each pins one radix tree node.",
    "late_store_nodes": "Radix tree nodes pinned for stores that were given up.",
    "lookahead_requests": "Waiting requests held back while their pages are read.",
    "lookahead_tokens": "Those of withheld_tokens that are read ahead into.",
    "detached": "1 since weights changed at run time: the pool is not used until a restart.",
}


class Exported(NamedTuple):
    """One metric: its name without what prometheus_client appends, its type and its help."""

    name: str
    kind: str
    help: str


def exported() -> dict[str, Exported]:
    """Every exported metric, by the name it has in `metrics`."""
    levels = LEVELS | CACHE_LEVELS
    table = {}
    for name, text in (NAMES | levels).items():
        if name in levels:
            kind, shown = "gauge", name
        elif name.endswith("_us"):
            kind, shown = "histogram", name.removesuffix("_us") + "_seconds"
        else:
            kind, shown = "counter", name + "_total"
        table[name] = Exported(PREFIX + shown, kind, text)
    return table


def cache_levels(cache: Any) -> dict[str, int]:
    """`CACHE_LEVELS` of a `HiRadixCacheDirect` now."""
    controller = cache.direct_controller
    ahead = controller.look_ahead
    return {
        "store_queue_jobs": len(cache.linker.pending_offloads),
        "late_store_nodes": len(cache.late_stores),
        "lookahead_requests": 0 if ahead is None else ahead.held_requests,
        "lookahead_tokens": 0 if ahead is None else ahead.held_tokens,
        "detached": int(controller.detached),
    }


class SGLangCollectors:
    """SGLang's collectors of a cache with tiers, fed with what moves between device and pool.

    The one copy does the work of both of HiCache's, so it counts as both: as load-back to the
    device, and as prefetch from storage. Write-back counts as backup to storage only: SGLang's
    `hicache_backup_…` are copies to host memory, and there are none.

    Args:
        storage: a `StorageMetricsCollector`.
        page_tokens: tokens of a page.
        page_objects: stored objects of a page, on one rank; pages are counted as objects.
    """

    def __init__(self, storage: Any, page_tokens: int, page_objects: int) -> None:
        self._storage = storage
        self._page_tokens = page_tokens
        self._page_objects = page_objects
        # The cache's `RadixCacheMetricsCollector`, once there is a cache.
        self.radix: Any = None

    def add(self, amounts: dict[str, int]) -> None:
        """Counters as they are counted. From any thread."""
        if tokens := amounts.get("load_tokens"):
            self._storage.log_prefetched_tokens(tokens)
            if self.radix is not None:
                self.radix.increment_load_back_num_tokens(tokens, pool="kv")
        if self.radix is not None and "load_us" in amounts:
            self.radix.increment_load_back_num_bytes(amounts.get("load_bytes", 0))
            self.radix.observe_load_back_duration(amounts["load_us"] * _US)
        for kind, shown in (("load", "prefetch"), ("store", "backup")):
            took_us = amounts.get(f"{kind}_us", 0)
            if took_us and (objects := amounts.get(f"{kind}_pages")):
                gbps = amounts[f"{kind}_bytes"] / took_us / 1e3
                self._log_storage(shown, objects // self._page_objects, gbps)

    def _log_storage(self, shown: str, pages: int, gbps: float) -> None:
        from sglang.srt.observability.metrics_collector import StorageMetrics

        sample = {f"{shown}_pgs": [pages], f"{shown}_bandwidth": [gbps]}
        self._storage.log_storage_metrics(StorageMetrics(**sample))
        if shown == "backup":
            self._storage.log_backuped_tokens(pages * self._page_tokens)


class PrometheusMetrics(Metrics):
    """Counters that are exported as they are counted.

    Args:
        labels: of every series: SGLang's for this rank.
        sglang: SGLang's collectors, fed beside.
    """

    is_exported = True

    def __init__(self, labels: dict[str, Any], sglang: SGLangCollectors | None = None) -> None:
        super().__init__()
        # After SGLang has set PROMETHEUS_MULTIPROC_DIR, which is read at import.
        from prometheus_client import Counter, Gauge, Histogram

        names = list(labels)
        self._sglang = sglang
        self._cache: Any = None
        self._series: dict[str, Any] = {}
        for name, (shown, kind, text) in exported().items():
            made: Any
            if kind == "counter":
                made = Counter(shown, text, names)
            elif kind == "histogram":
                made = Histogram(shown, text, names, buckets=_SECONDS)
            else:
                made = Gauge(shown, text, names, multiprocess_mode="mostrecent")
            self._series[name] = made.labels(**labels)

    def add(self, **amounts: int) -> None:
        super().add(**amounts)
        for name, amount in amounts.items():
            if name.endswith("_us"):
                self._series[name].observe(amount * _US)
            elif amount:
                self._series[name].inc(amount)
        if self._sglang is not None:
            self._sglang.add(amounts)

    def join(self, cache: Any) -> None:
        self._cache = cache
        if self._sglang is not None:
            self._sglang.radix = cache.metrics_collector

    def show(self, **levels: int) -> None:
        if self._cache is not None:
            levels |= cache_levels(self._cache)
        for name, level in levels.items():
            self._series[name].set(level)


def of_this_rank(cache_type: str, page_tokens: int, page_objects: int) -> PrometheusMetrics:
    """Metrics with the labels that SGLang gives the cache of this rank."""
    from sglang.srt.layers.dp_attention import is_dp_attention_enabled
    from sglang.srt.observability import metrics_collector
    from sglang.srt.runtime_context import get_observability, get_parallel

    labels = metrics_collector.radix_cache_metric_labels(
        cache_type, get_parallel(), is_dp_attention_enabled()
    )
    labels.update(get_observability().extra_metric_labels or {})
    storage = metrics_collector.resolve_collector_class(
        metrics_collector.STAT_LOGGER_ROLE_STORAGE, metrics_collector.StorageMetricsCollector
    )
    ours = {"storage_backend": STORAGE, **{k: v for k, v in labels.items() if k != "cache_type"}}
    sglang = SGLangCollectors(storage(labels=ours), page_tokens, page_objects)
    return PrometheusMetrics(labels, sglang)
