# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""What is exported: the same numbers that are counted, under names that the documents use."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import metrics_doc
import pytest
import yaml
from prometheus_client import REGISTRY

from ascend_direct.integration.prometheus import PrometheusMetrics, exported
from ascend_direct.metrics import LEVELS, NAMES, Metrics

LABELS = {"cache_type": "HiRadixCacheDirect", "tp_rank": "0", "pp_rank": "0", "dp_rank": "0"}
SUFFIXES = {"counter": ("",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
# Of SGLang's own that the documents speak of; the end-to-end test sees them on a real server.
OF_SGLANG = {"sglang:cached_tokens_total", "sglang:prompt_tokens_total"}
_METRIC = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*:?[a-zA-Z0-9_]*")


@pytest.fixture(scope="module")
def metrics() -> PrometheusMetrics:
    return PrometheusMetrics(LABELS)


def value(name: str) -> float:
    found = REGISTRY.get_sample_value(name, LABELS)
    assert found is not None, f"{name} is not exported"
    return found


def named(query: str) -> set[str]:
    """Metrics that a PromQL expression speaks of."""
    words = set(_METRIC.findall(re.sub(r"\{[^}]*\}|\[[^\]]*\]", "", query)))
    return {word for word in words if word.startswith(("ascend_direct_", "sglang:"))}


def known() -> set[str]:
    series = {e.name + end for e in exported().values() for end in SUFFIXES[e.kind]}
    return series | OF_SGLANG


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
    for number, name in enumerate(LEVELS):
        metrics.show(**{name: number})
        assert value(f"ascend_direct_{name}") == number


def test_every_counter_and_level_is_exported_and_explained() -> None:
    assert set(exported()) == set(NAMES) | set(LEVELS)
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
    assert len(queries) > 15
    for query in queries:
        assert named(query), f"no metric in {query}"
        assert named(query) <= known(), f"unknown metrics in {query}: {named(query) - known()}"
        assert query.count("(") == query.count(")"), query


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
