# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""A pool that fails in the middle of traffic: every request is answered right, by recomputing.

The pool is reached through a third-party provider with an entry point of its own.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

import pytest
from sglang_cpu.client import Generation
from sglang_cpu.server import SGLangServer
from two_instances.cluster import Cluster

from .farm import Farm
from .test_aborts import pool_of, some_prompt, store_with_a

pytestmark = pytest.mark.parametrize("cluster", ["faults"], indirect=True)

CONCURRENCY = 4
OUTPUT_TOKENS = 4
RECOVERY_S = 60.0


def traffic(server: SGLangServer, prompts: Sequence[Sequence[int]]) -> list[Generation]:
    return server.generate_many(
        prompts, CONCURRENCY, OUTPUT_TOKENS, return_cached_tokens_details=True
    )


def from_pool(answers: Sequence[Generation]) -> int:
    return sum(answer.cached_tokens_details.get("storage", 0) for answer in answers)


def assert_recovers(server: SGLangServer, prompts: Sequence[Sequence[int]]) -> list[Generation]:
    """In a while the pool is used again for these prompts, all of which it holds."""
    deadline_s = time.monotonic() + RECOVERY_S
    wanted = sum(len(prompt) for prompt in prompts) * 0.9
    while True:
        server.flush()
        answers = traffic(server, prompts)
        if from_pool(answers) >= wanted:
            return answers
        assert time.monotonic() < deadline_s, f"{from_pool(answers)} tokens of {wanted:.0f} loaded"
        time.sleep(0.5)


@pytest.mark.parametrize("mode", ["raise", "missing", "hang"])
def test_loads_that_fail_are_recomputed_and_later_ones_load_again(
    cluster: Cluster, farm: Farm, dice: random.Random, mode: str
) -> None:
    b, prompts = cluster.servers["B"], [some_prompt(dice) for _ in range(8)]
    store_with_a(cluster, farm, prompts)
    truth = [answer.output_ids for answer in traffic(farm.reference, prompts)]
    faults = pool_of(cluster).faults
    healthy, failing = traffic(b, prompts[:2]), faults.count("get", mode)
    assert from_pool(healthy) > 0
    with faults.on("get", mode):
        recomputed = traffic(b, prompts[2:])
        assert faults.count("get", mode) > failing, "the fault was not met"
    assert [answer.output_ids for answer in healthy + recomputed] == truth
    assert from_pool(recomputed) == 0
    assert [answer.output_ids for answer in assert_recovers(b, prompts)] == truth


@pytest.mark.parametrize("mode", ["raise", "missing", "hang"])
def test_lookups_that_fail_are_misses_and_later_ones_hit_again(
    cluster: Cluster, farm: Farm, dice: random.Random, mode: str
) -> None:
    b, prompts = cluster.servers["B"], [some_prompt(dice) for _ in range(4)]
    store_with_a(cluster, farm, prompts)
    truth = [answer.output_ids for answer in traffic(farm.reference, prompts)]
    faults = pool_of(cluster).faults
    asked = faults.count("exists", mode)
    with faults.on("exists", mode):
        recomputed = traffic(b, prompts)
        assert faults.count("exists", mode) > asked, "the fault was not met"
    assert [answer.output_ids for answer in recomputed] == truth
    assert from_pool(recomputed) == 0
    assert [answer.output_ids for answer in assert_recovers(b, prompts)] == truth


@pytest.mark.parametrize("mode", ["raise", "missing", "hang"])
def test_stores_that_fail_cost_a_recompute_and_later_ones_store_again(
    cluster: Cluster, farm: Farm, dice: random.Random, mode: str
) -> None:
    a, prompts = cluster.servers["A"], [some_prompt(dice) for _ in range(4)]
    truth = [answer.output_ids for answer in traffic(farm.reference, prompts)]
    faults = pool_of(cluster).faults
    puts = faults.count("put", mode)
    with faults.on("put", mode):
        assert [answer.output_ids for answer in traffic(a, prompts)] == truth
        deadline_s = time.monotonic() + RECOVERY_S
        while faults.count("put", mode) == puts:
            assert time.monotonic() < deadline_s, "the fault was not met"
            time.sleep(0.05)
        if mode == "hang":  # past store_timeout_ms the hanging store is given up, its pages kept
            time.sleep(4)
            assert [answer.output_ids for answer in traffic(a, prompts)] == truth
    a.flush()
    fresh = [some_prompt(dice) for _ in range(2)]
    time.sleep(1)
    store_with_a(cluster, farm, fresh)
    assert_recovers(cluster.servers["B"], fresh)
