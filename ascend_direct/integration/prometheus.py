# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""What `--enable-metrics` exports of this cache, on SGLang's own /metrics endpoint.

Owns names, help texts and buckets, and feeds prometheus_client. What is counted is `metrics`'s; how
many prompt tokens came from the pool is SGLang's `sglang:cached_tokens_total` with
`cache_source="storage"`, which hits of this cache feed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ascend_direct.metrics import LEVELS, NAMES, Metrics

PREFIX = "ascend_direct_"
_US = 1e-6
# From a hit of a few pages in host memory to the default load_timeout_ms; stores may take longer.
_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)


class Exported(NamedTuple):
    """One metric: its name without what prometheus_client appends, its type and its help."""

    name: str
    kind: str
    help: str


def exported() -> dict[str, Exported]:
    """Every exported metric, by the name it has in `metrics`."""
    table = {}
    for name, text in (NAMES | LEVELS).items():
        if name in LEVELS:
            kind, shown = "gauge", name
        elif name.endswith("_us"):
            kind, shown = "histogram", name.removesuffix("_us") + "_seconds"
        else:
            kind, shown = "counter", name + "_total"
        table[name] = Exported(PREFIX + shown, kind, text)
    return table


class PrometheusMetrics(Metrics):
    """Counters that are exported as they are counted.

    Args:
        labels: of every series: SGLang's for this rank.
    """

    is_exported = True

    def __init__(self, labels: dict[str, Any]) -> None:
        super().__init__()
        # After SGLang has set PROMETHEUS_MULTIPROC_DIR, which is read at import.
        from prometheus_client import Counter, Gauge, Histogram

        names = list(labels)
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

    def show(self, **levels: int) -> None:
        for name, level in levels.items():
            self._series[name].set(level)


def of_this_rank(cache_type: str) -> PrometheusMetrics:
    """Metrics with the labels that SGLang gives the cache of this rank."""
    from sglang.srt.layers.dp_attention import is_dp_attention_enabled
    from sglang.srt.observability.metrics_collector import radix_cache_metric_labels
    from sglang.srt.runtime_context import get_observability, get_parallel

    labels = radix_cache_metric_labels(cache_type, get_parallel(), is_dp_attention_enabled())
    labels.update(get_observability().extra_metric_labels or {})
    return PrometheusMetrics(labels)
