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

Made by `python scripts/metrics_doc.py` from `ascend_direct/metrics.py`; do not edit.

With SGLang's `--enable-metrics` each rank exports these on the server's `/metrics`, beside SGLang's
own. Labels: `cache_type`, `tp_rank`, `pp_rank`, `dp_rank`, as on SGLang's metrics of the radix
cache. Without it nothing is exported and prometheus_client is not imported.

* Prompt tokens by tier are SGLang's: `sglang:cached_tokens_total{cache_source="storage"}` are those
  from the pool, `"device"` those that were on the device; `sglang:prompt_tokens_total` is all.
* Pages and bytes are what a rank moved: sum them over ranks. With MLA each rank moves its share.
* A page of a GQA pool with `heads_per_object` counts once per object.

`docs/grafana/ascend_direct.json` is a dashboard (Grafana → Dashboards → Import),
`docs/grafana/alerts.yaml` holds rules for Prometheus.

| metric | type | meaning |
|---|---|---|
"""
LOAD_TIMES = "sum(rate(ascend_direct_load_seconds_bucket[1m])) by (le)"
CACHED = 'sglang:cached_tokens_total{cache_source!="total"}'
CACHED_BY_SOURCE = f"sum(rate({CACHED}[1m])) by (cache_source)"
PER_RANK = " by (tp_rank)"
# Title, unit, (PromQL, legend) of each panel.
PANELS: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...] = (
    (
        "Prompt tokens by tier",
        "short",
        (
            (
                CACHED_BY_SOURCE,
                "{{cache_source}}",
            ),
            ("sum(rate(sglang:prompt_tokens_total[1m]))", "all"),
        ),
    ),
    (
        "Load time",
        "s",
        tuple(
            (
                f"histogram_quantile({share}, {LOAD_TIMES})",
                f"p{share * 100:.0f}",
            )
            for share in (0.5, 0.99)
        ),
    ),
    (
        "Bytes per second",
        "Bps",
        (
            ("sum(rate(ascend_direct_load_bytes_total[1m]))", "loaded"),
            ("sum(rate(ascend_direct_store_bytes_total[1m]))", "stored"),
        ),
    ),
    (
        "Loads refused, by cause",
        "short",
        tuple(
            (f"sum(rate(ascend_direct_loads_{cause}_total[5m]))", cause)
            for cause in ("failed", "late", "corrupt")
        ),
    ),
    (
        "Stores lost, by cause",
        "short",
        (
            ("sum(rate(ascend_direct_stores_dropped_queue_full_total[5m]))", "queue full"),
            ("sum(rate(ascend_direct_stores_dropped_deadline_total[5m]))", "deadline"),
            ("sum(rate(ascend_direct_stores_late_total[5m]))", "hung call"),
            ("sum(rate(ascend_direct_store_failed_pages_total[5m]))", "pages the pool refused"),
        ),
    ),
    (
        "Pool left alone (1 = only probed)",
        "short",
        (
            ("max(ascend_direct_pool_left_alone)" + PER_RANK, "lookups, rank {{tp_rank}}"),
            ("max(ascend_direct_loads_left_alone)" + PER_RANK, "loads, rank {{tp_rank}}"),
        ),
    ),
    (
        "Bytes waiting to be stored",
        "bytes",
        (("sum(ascend_direct_store_queue_bytes)" + PER_RANK, "rank {{tp_rank}}"),),
    ),
    (
        "Device slots withheld for calls under way",
        "short",
        (("sum(ascend_direct_withheld_tokens)" + PER_RANK, "rank {{tp_rank}}"),),
    ),
)


def page() -> str:
    """docs/metrics.md, as it should be."""
    rows = [f"| `{e.name}` | {e.kind} | {e.help} |" for e in exported().values()]
    return HEAD + "\n".join(rows) + "\n"


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
