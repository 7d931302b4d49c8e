# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Writes docs/metrics.md and docs/grafana/ascend_direct.json: `python scripts/metrics_doc.py`.

Owns the page's form and the dashboard's panels; names and meanings are the exporter's. A test holds
both files equal to what this makes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ascend_direct.integration.prometheus import exported

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = DOCS / "metrics.md"
DASHBOARD = DOCS / "grafana" / "ascend_direct.json"
HEAD = """\
# Metrics

Made by `python scripts/metrics_doc.py` from the package's `metrics.py` and `prometheus.py`.

With SGLang's `--enable-metrics` each rank exports these on the server's `/metrics`, beside SGLang's
own. Labels: `cache_type`, `tp_rank`, `pp_rank`, `dp_rank`, as on SGLang's metrics of the radix
cache. Without it nothing is exported and prometheus_client is not imported.

* Prompt tokens by tier are SGLang's: `sglang:cached_tokens_total{cache_source="storage"}` are those
  from the pool, `"device"` those that were on the device; `sglang:prompt_tokens_total` is all, and
  what is left was computed.
* Pages and bytes are what a rank moved: sum them over ranks. With MLA each rank moves its share.
* A page of a GQA pool with `heads_per_object` counts once per object.
* A refused load is counted under one cause: `loads_failed` (of which `loads_missing`; with `verify`
  also `loads_corrupt`), `loads_late`, `loads_fence_late`, `loads_busy`, `loads_not_tried`,
  `loads_elsewhere`, `loads_detached`. A read ahead that was given up (`loads_late`) is counted
  again by what became of it when its call returned.

`docs/grafana/ascend_direct.json` is a dashboard (Grafana → Dashboards → Import),
`docs/grafana/alerts.yaml` holds rules for Prometheus.

| metric | type | meaning |
|---|---|---|
"""
OF_SGLANG = {
    "sglang:cached_tokens_total": "by `cache_source`: `device`, and `storage` for the pool",
    "sglang:prompt_tokens_total": "all prompt tokens",
    "sglang:load_back_tokens_total": 'tokens loaded, `pool="kv"`; read one rank',
    "sglang:load_back_bytes_total": "bytes loaded; sum over ranks",
    "sglang:load_back_duration_seconds": "as `ascend_direct_load_seconds`, in SGLang's buckets",
    "sglang:prefetched_tokens_total": "as `sglang:load_back_tokens_total`",
    "sglang:prefetch_pgs": "pages of a load; with MLA a rank's share",
    "sglang:prefetch_bandwidth": "GB/s of a load",
    "sglang:backuped_tokens_total": "tokens stored; with MLA a rank's share",
    "sglang:backup_pgs": "pages of a store, without those that the pool had",
    "sglang:backup_bandwidth": "GB/s of a store",
}
TAIL = """
## SGLang's own

Dashboards made for HiCache show the pool as its storage. All but the first two SGLang feeds for
HiCache and not for linkers, so this package does. One copy goes straight from pool to device, and
counts as both of HiCache's, storage to host and host to device. Those of the storage have the label
`storage_backend="ascend_direct"`. `sglang:hicache_backup_…` stay empty: nothing is copied to a
host tier.

| metric | meaning here |
|---|---|
"""
CACHED = 'sglang:cached_tokens_total{cache_source!="total"}'
CACHED_BY_SOURCE = f"sum(rate({CACHED}[1m])) by (cache_source)"
PROMPT = "sum(rate(sglang:prompt_tokens_total[1m]))"
PER_RANK = " by (tp_rank)"
Query = tuple[str, str]


def _rates(minutes: int, **named: str) -> tuple[Query, ...]:
    """Counters of ours per second, by their legend."""
    return tuple(
        (f"sum(rate(ascend_direct_{name}_total[{minutes}m]))", legend.replace("_", " "))
        for legend, name in named.items()
    )


def _levels(*names: str) -> tuple[Query, ...]:
    return tuple(
        (f"sum(ascend_direct_{name}){PER_RANK}", f"{name.replace('_', ' ')}, rank {{{{tp_rank}}}}")
        for name in names
    )


def _times(kind: str) -> tuple[Query, ...]:
    buckets = f"sum(rate(ascend_direct_{kind}_seconds_bucket[1m])) by (le)"
    return tuple((f"histogram_quantile({q}, {buckets})", f"p{q * 100:.0f}") for q in (0.5, 0.99))


def _speed(kind: str, legend: str) -> Query:
    moved, time = (
        f"sum(rate(ascend_direct_{kind}_{what}[1m]))" for what in ("bytes_total", "seconds_sum")
    )
    return f"{moved} / {time}", legend


((FAILED, _), (MISSING, _)) = _rates(5, failed="loads_failed", missing="loads_missing")
# Title, unit, (PromQL, legend) of each panel.
PANELS: tuple[tuple[str, str, tuple[Query, ...]], ...] = (
    (
        "Prompt tokens by tier (hits), and computed (misses)",
        "short",
        (
            (CACHED_BY_SOURCE, "{{cache_source}}"),
            (f"{PROMPT} - (sum(rate({CACHED}[1m])) or vector(0))", "computed"),
        ),
    ),
    (
        "Share of prompt tokens by tier",
        "percentunit",
        ((f"{CACHED_BY_SOURCE} / scalar({PROMPT})", "{{cache_source}}"),),
    ),
    ("Load time", "s", _times("load")),
    ("Store time", "s", _times("store")),
    ("Bytes per second", "Bps", _rates(1, loaded="load_bytes", stored="store_bytes")),
    ("Speed while moving", "Bps", (_speed("load", "load"), _speed("store", "store"))),
    (
        "Lookups",
        "short",
        _rates(
            1,
            all="lookups",
            from_memo="lookups_from_memo",
            timed_out="lookups_timed_out",
            put_off="lookups_put_off",
        ),
    ),
    (
        "Pages per second",
        "short",
        _rates(
            1,
            promised="lookup_hit_pages",
            loaded="load_pages",
            stored="store_pages",
            in_the_pool_already="store_skipped_pages",
        ),
    ),
    (
        "Loads, and refused ones by cause",
        "short",
        (
            *_rates(5, landed="loads", pages_gone="loads_missing"),
            (
                f"{FAILED} - {MISSING}",
                "not delivered",
            ),
            *_rates(
                5,
                late="loads_late",
                device_late="loads_fence_late",
                earlier_call_hangs="loads_busy",
                left_alone="loads_not_tried",
                refused_on_another_rank="loads_elsewhere",
                detached="loads_detached",
                wrong_digest="loads_corrupt",
            ),
        ),
    ),
    (
        "Stores lost, by cause",
        "short",
        _rates(
            5,
            queue_full="stores_dropped_queue_full",
            deadline="stores_dropped_deadline",
            hung_call="stores_late",
            pages_the_pool_refused="store_failed_pages",
        ),
    ),
    (
        "Pool left alone (1 = only probed; detached: until a restart)",
        "short",
        (
            ("max(ascend_direct_pool_left_alone)" + PER_RANK, "lookups, rank {{tp_rank}}"),
            ("max(ascend_direct_loads_left_alone)" + PER_RANK, "loads, rank {{tp_rank}}"),
            ("max(ascend_direct_detached)" + PER_RANK, "detached, rank {{tp_rank}}"),
            ("sum(increase(ascend_direct_breaker_opened_total[5m]))", "opened in 5 min"),
        ),
    ),
    ("Bytes waiting to be stored", "bytes", _levels("store_queue_bytes")),
    ("Nodes pinned by stores", "short", _levels("store_queue_jobs", "late_store_nodes")),
    (
        "Device slots withheld for calls under way",
        "short",
        _levels("withheld_tokens", "lookahead_tokens"),
    ),
    (
        "Look-ahead: requests held, and given up per second",
        "short",
        (*_levels("lookahead_requests"), *_rates(5, given_up="lookahead_given_up")),
    ),
    (
        "Admission by cost",
        "short",
        (*_levels("least_load_tokens"), *_rates(5, hits_not_worth_a_load="hits_not_worth")),
    ),
)
# No panel: `load_tokens` is what SGLang counts as storage hits, `stores` is a number of jobs.
WITHOUT_PANEL = ("load_tokens_total", "stores_total")


def page() -> str:
    """docs/metrics.md, as it should be."""
    ours = [f"| `{e.name}` | {e.kind} | {e.help} |" for e in exported().values()]
    sglangs = [f"| `{name}` | {text} |" for name, text in OF_SGLANG.items()]
    return HEAD + "\n".join(ours) + "\n" + TAIL + "\n".join(sglangs) + "\n"


def dashboard() -> dict[str, Any]:
    """The dashboard in Grafana's model, two panels a row."""
    return {
        "uid": "ascend-direct",
        "title": "ascend_direct",
        "tags": ["sglang", "kv-cache"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {
            "list": [
                {
                    "name": "source",
                    "label": "Prometheus",
                    "type": "datasource",
                    "query": "prometheus",
                }
            ]
        },
        "panels": [_panel(number, *panel) for number, panel in enumerate(PANELS)],
    }


def _panel(
    number: int, title: str, unit: str, queries: tuple[tuple[str, str], ...]
) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${source}"}
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": title,
        "datasource": source,
        "gridPos": {"h": 8, "w": 12, "x": 12 * (number % 2), "y": 8 * (number // 2)},
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "targets": [
            {
                "refId": chr(ord("A") + n),
                "expr": query,
                "legendFormat": legend,
                "datasource": source,
            }
            for n, (query, legend) in enumerate(queries)
        ],
    }


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")
    DASHBOARD.parent.mkdir(exist_ok=True)
    DASHBOARD.write_text(json.dumps(dashboard(), indent=1) + "\n", encoding="utf-8")
    print(f"{PAGE.name}, {DASHBOARD.name} written")


if __name__ == "__main__":
    main()
