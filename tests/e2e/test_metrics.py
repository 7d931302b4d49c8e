# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""A real server's /metrics: what a pool hit adds to it."""

from __future__ import annotations

import random

import metrics_doc
import pytest
from sglang_cpu.client import SGLangClient
from two_instances.cluster import Cluster

from .farm import Farm


def exported(server: SGLangClient) -> dict[str, float]:
    """Sums over all label sets, by name with its cache_source where there is one."""
    totals: dict[str, float] = {}
    for line in server.get_text("/metrics").splitlines():
        if line.startswith("#") or not line:
            continue
        series, number = line.rsplit(" ", 1)
        name, _, labels = series.partition("{")
        source = next((p for p in labels.split(",") if p.startswith("cache_source=")), "")
        key = f"{name}[{source.split(chr(34))[1]}]" if source else name
        totals[key] = totals.get(key, 0.0) + float(number)
    return totals


@pytest.mark.parametrize("cluster", ["page64"], indirect=True)
def test_a_pool_hit_shows_in_the_servers_metrics(
    cluster: Cluster, farm: Farm, dice: random.Random
) -> None:
    a, b = cluster.servers["A"], cluster.servers["B"]
    prompt = [dice.randint(3, 1000) for _ in range(700)]
    pages = cluster.pool.stored_pages()
    a.generate(prompt, 1)
    cluster.pool.wait_stored(pages + 10)
    before = exported(b)
    got = b.generate(prompt, 1, return_cached_tokens_details=True)
    assert got.cached_tokens_details["storage"] == 640
    after = exported(b)
    of_a = exported(a)
    assert of_a["sglang:backuped_tokens_total"] >= 640

    def gain(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    assert gain("sglang:cached_tokens_total[storage]") == 640
    assert gain("ascend_direct_loads_total") == 1
    assert gain("ascend_direct_load_pages_total") == 640 // farm.page_size
    assert gain("ascend_direct_load_seconds_count") == 1
    assert gain("ascend_direct_load_tokens_total") == 640
    assert gain("sglang:load_back_tokens_total") == 640
    assert gain("sglang:load_back_duration_seconds_count") == 1
    assert gain("sglang:load_back_bytes_total") == gain("ascend_direct_load_bytes_total") > 0
    assert gain("sglang:prefetch_pgs_sum") == gain("ascend_direct_load_pages_total")
    assert gain("sglang:prefetch_bandwidth_count") == 1
    assert after["ascend_direct_pool_left_alone"] == 0
    series = {name.partition("[")[0] for name in after | of_a}
    missing = {name for name in metrics_doc.OF_SGLANG if not series & {name, f"{name}_sum"}}
    assert not missing, "docs/metrics.md names them"
