# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""What is exported: the same numbers that are counted, under names that the documents use."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any, NamedTuple

import metrics_doc
import promql_parser
import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models import units
from grafana_foundation_sdk.models.dashboard import Dashboard
from prometheus_client import REGISTRY
from sglang.srt.observability import metrics_collector

from ascend_direct.integration.prometheus import (
    CACHE_LEVELS,
    PrometheusMetrics,
    SGLangCollectors,
    cache_levels,
    exported,
)
from ascend_direct.metrics import LEVELS, NAMES, Metrics

LABELS = {"cache_type": "HiRadixCacheDirect", "tp_rank": "0", "pp_rank": "0", "dp_rank": "0"}
SUFFIXES = {"counter": ("",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
STORAGE_LABELS = {"storage_backend": "ascend_direct", "tp_rank": "0"}
OF_STORAGE = ("sglang:prefetch", "sglang:backup")
PAGE_TOKENS, PAGE_OBJECTS = 64, 2


class Cache(NamedTuple):
    """What `join` looks at before there is anything to show."""

    metrics_collector: Any


@pytest.fixture(scope="module")
def metrics() -> PrometheusMetrics:
    storage = metrics_collector.StorageMetricsCollector(STORAGE_LABELS)
    made = PrometheusMetrics(LABELS, SGLangCollectors(storage, PAGE_TOKENS, PAGE_OBJECTS))
    made.join(Cache(metrics_collector.RadixCacheMetricsCollector(LABELS)))
    made._cache = None
    return made


def value(name: str, **more: str) -> float:
    labels = STORAGE_LABELS if name.startswith(OF_STORAGE) else LABELS
    found = REGISTRY.get_sample_value(name, labels | more)
    assert found is not None, f"{name} is not exported"
    return found


def named(query: str) -> set[str]:
    """Metrics that a PromQL expression speaks of; one that is no PromQL is a ValueError."""
    names = set()

    def note(part: promql_parser.Expr) -> bool:
        names.update({part.name} if isinstance(part, promql_parser.VectorSelector) else ())
        return True

    promql_parser.walk(promql_parser.parse(query), note)
    return names


def known() -> set[str]:
    series = {e.name + end for e in exported().values() for end in SUFFIXES[e.kind]}
    return series | set(metrics_doc.OF_SGLANG)


def test_a_counter_is_exported_as_it_is_counted(metrics) -> None:
    for name, (shown, kind, _) in exported().items():
        if kind == "counter":
            before = value(shown)
            metrics.add(**{name: 3})
            assert value(shown) == before + 3
            assert metrics.snapshot()[name] >= 3


def test_a_duration_is_exported_in_seconds(metrics) -> None:
    metrics.add(loads=1, load_us=1_500)
    assert value("ascend_direct_load_seconds_count") == 1
    assert value("ascend_direct_load_seconds_sum") == pytest.approx(0.0015)


def test_a_level_is_exported_as_it_is_shown(metrics) -> None:
    for number, name in enumerate(LEVELS | CACHE_LEVELS):
        metrics.show(**{name: number})
        assert value(f"ascend_direct_{name}") == number


def test_every_counter_and_level_is_exported_and_explained() -> None:
    assert set(exported()) == set(NAMES) | set(LEVELS) | set(CACHE_LEVELS)
    assert all(len(e.help) > 10 for e in exported().values())


def test_a_server_without_metrics_exports_nothing(make) -> None:
    assert type(make().controller.metrics) is Metrics


def test_levels_follow_a_late_load(make) -> None:
    from .prompts import prompt, serve_and_store

    a, b = make(), make(config={"load_timeout_ms": 40})
    tokens = prompt(200)
    serve_and_store(a, tokens)
    b.store.faults["get"].hold()
    b.serve(tokens)
    shown: dict[str, int] = {}
    b.controller.metrics.show = shown.update
    b.controller.show_levels()
    assert set(shown) == set(LEVELS)
    assert shown["withheld_tokens"] == 192


def test_levels_tell_what_stores_pin(make) -> None:
    from tests.waiting import eventually

    from .prompts import prompt

    a = make(config={"load_timeout_ms": 40, "store_timeout_ms": 40})
    a.store.faults["put"].hold()
    a.serve(prompt(200))
    assert cache_levels(a.tree)["store_queue_jobs"] == 1
    eventually(lambda: a.tree.check_hicache_events() or a.tree.late_stores)
    levels = cache_levels(a.tree)
    assert (levels["store_queue_jobs"], levels["late_store_nodes"]) == (0, 1)
    a.store.faults["put"].release()
    eventually(lambda: a.tree.check_hicache_events() or not a.tree.late_stores)
    assert cache_levels(a.tree)["late_store_nodes"] == 0


def test_levels_tell_what_is_read_ahead_and_that_the_pool_was_left_for_good(make) -> None:
    from .prompts import prompt, serve_and_store

    a, b = make(), make(config={"load_mode": "lookahead"})
    tokens = prompt(200)
    serve_and_store(a, tokens)
    b.store.faults["get"].hold()
    b.submit(tokens)
    for _ in range(50):
        b.look_ahead.round(b.tree, [r.req for r in b.requests], 0)
        if cache_levels(b.tree)["lookahead_tokens"]:
            break
        time.sleep(0.01)
    levels = cache_levels(b.tree)
    assert (levels["lookahead_requests"], levels["lookahead_tokens"]) == (1, 192)
    assert levels["detached"] == 0
    b.controller.detach("a test")
    assert cache_levels(b.tree)["detached"] == 1


def test_sglangs_own_collectors_are_fed_with_loads_and_stores(metrics) -> None:
    tokens = value("sglang:load_back_tokens_total", pool="kv")
    metrics.add(loads=1, load_pages=6, load_bytes=3_000_000, load_us=1_000)
    metrics.add(load_tokens=3 * PAGE_TOKENS)
    assert value("sglang:load_back_tokens_total", pool="kv") == tokens + 3 * PAGE_TOKENS
    assert value("sglang:load_back_bytes_total") == 3_000_000
    assert value("sglang:prefetched_tokens_total") == tokens + 3 * PAGE_TOKENS
    assert value("sglang:prefetch_pgs_sum") == 3, "pages, not objects"
    assert value("sglang:prefetch_bandwidth_sum") == pytest.approx(3.0)
    metrics.add(stores=1, store_pages=4, store_bytes=1_000_000, store_us=1_000)
    assert value("sglang:backup_pgs_sum") == 2
    assert value("sglang:backup_bandwidth_sum") == pytest.approx(1.0)
    assert value("sglang:backuped_tokens_total") == 2 * PAGE_TOKENS


def test_a_store_of_what_the_pool_has_is_no_backup(metrics) -> None:
    before = value("sglang:backup_pgs_count")
    metrics.add(stores=1, store_pages=0, store_bytes=0, store_us=9, store_skipped_pages=4)
    assert value("sglang:backup_pgs_count") == before


def test_without_metrics_prometheus_is_not_imported() -> None:
    code = "import sys, ascend_direct.metrics; sys.exit('prometheus_client' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_page_and_the_dashboard_are_what_the_exporter_makes() -> None:
    hint = "run python scripts/metrics_doc.py"
    assert metrics_doc.PAGE.read_text(encoding="utf-8") == metrics_doc.page(), hint
    assert json.loads(metrics_doc.DASHBOARD.read_text()) == metrics_doc.dashboard(), hint


def test_every_query_names_metrics_that_exist() -> None:
    rules = yaml.safe_load((metrics_doc.DASHBOARD.parent / "alerts.yaml").read_text())
    queries = [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    for panel in metrics_doc.dashboard()["panels"]:
        queries += [target["expr"] for target in panel["targets"]]
    assert len(queries) > 25
    for query in queries:
        assert named(query), f"no metric in {query}"
        assert named(query) <= known(), f"unknown metrics in {query}: {named(query) - known()}"


def test_every_metric_has_a_panel() -> None:
    """But for those that only tell where others come from."""
    text = metrics_doc.DASHBOARD.read_text()
    unseen = {e.name for e in exported().values() if e.name not in text}
    assert unseen <= {f"ascend_direct_{name}" for name in metrics_doc.WITHOUT_PANEL}, unseen


def test_a_query_that_is_no_promql_is_seen() -> None:
    with pytest.raises(ValueError, match="unclosed left parenthesis"):
        named("sum(rate(ascend_direct_loads_total[5m])")


def survives(given: Any, kept: Any, where: str) -> None:
    """Grafana's own model drops what it does not know, so nothing may get lost in it."""
    if isinstance(given, dict):
        assert isinstance(kept, dict), where
        assert given.keys() <= kept.keys(), f"{where}: {given.keys() - kept.keys()}"
        for key, part in given.items():
            survives(part, kept[key], f"{where}.{key}")
    elif isinstance(given, list):
        assert len(given) == len(kept), where
        for number, (one, other) in enumerate(zip(given, kept, strict=True)):
            survives(one, other, f"{where}[{number}]")
    else:
        assert given == kept, where


def test_the_dashboard_is_one_in_grafanas_own_model() -> None:
    register_default_plugins()
    board = json.loads(metrics_doc.DASHBOARD.read_text())
    kept = json.loads(JSONEncoder().encode(Dashboard.from_json(board)))
    survives(board, kept, "dashboard")
    shown = {panel["fieldConfig"]["defaults"]["unit"] for panel in board["panels"]}
    assert shown <= {value for value in vars(units).values() if isinstance(value, str)}


def test_the_dashboard_has_what_grafana_asks_of_one() -> None:
    board = json.loads(metrics_doc.DASHBOARD.read_text())
    assert {"uid", "title", "schemaVersion", "panels", "templating", "time"} <= set(board)
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in board["panels"]]
    assert len(set(places)) == len(places), "two panels in one place"
    (variable,) = board["templating"]["list"]
    for panel in board["panels"]:
        assert panel["type"] == "timeseries"
        assert panel["datasource"]["uid"] == f"${{{variable['name']}}}"
        assert 0 < panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
        refs = [target["refId"] for target in panel["targets"]]
        assert refs
        assert len(set(refs)) == len(refs)
