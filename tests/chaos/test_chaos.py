# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""A seeded slice of chaos: one short run of each world, judged by several tests.

The long run is `scripts/chaos --minutes 30`; both are the same code with other numbers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from sglang_cpu.models import make_model

from . import report, scenarios
from .events import Pace
from .run import Plan

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.sglang,
    pytest.mark.memcache,
    pytest.mark.timeout(900),
]
# Chosen so that MetaService is the last to be killed: whoever starts after that may be kept out of
# the pool until others are restarted, for which a slice has no time.
SEED = 40
PLAN = Plan(
    seed=SEED,
    length_s=60.0,
    pace=Pace(store_s=1.4, requests_s=3.0, pool_s=13.0, server_s=200.0, longest_stop_s=6.0),
    tracks=("store", "requests", "pool", "server"),
    clients=4,
    rest_every_s=60.0,
)
DISK_LENGTH_S = 12.0
# 32 prompts of 700 tokens: about what the pool holds.
FAMILIES = (8, 4)

Result = dict[str, Any]


@pytest.fixture(scope="module")
def results(
    tmp_path_factory: pytest.TempPathFactory, say: Callable[[str], None]
) -> dict[str, Result]:
    """Both runs, and where their reports are."""
    folder = tmp_path_factory.mktemp("chaos")
    model, begin_s = make_model(folder / "model", "gqa"), time.monotonic()
    chaos, prompts = scenarios.memcache(PLAN, FAMILIES, model, folder / "memcache", say)
    plan = replace(PLAN, length_s=DISK_LENGTH_S)
    disk = scenarios.full_disk(plan, prompts, model, folder / "disk", say)
    for name, result in (("memcache", chaos), ("disk", disk)):
        report.write(folder / name, {"command": "tests/chaos/test_chaos.py", **result})
        say(f"{name}: {result['requests']['answered']} answers, {result['events']}, "
            f"{len(result['problems'])} problems, {folder / name / 'report.md'}")  # fmt: skip
    say(f"chaos took {time.monotonic() - begin_s:.0f} s")
    return {"memcache": chaos, "disk": disk}


def test_no_request_notices_what_happens_to_the_pool_and_nothing_leaks(
    results: dict[str, Result],
) -> None:
    found = results["memcache"]
    assert found["problems"] == []
    assert found["events"]["done"] == found["events"]["planned"] >= 60


def test_the_faults_were_real(results: dict[str, Result]) -> None:
    found = results["memcache"]
    assert found["events"]["store_faults_that_calls_met"] >= found["events"]["done"] // 10
    assert found["requests"]["answered_from_pool"] > 0
    assert sum(n for name, n in found["processes"].items() if "killed" in name) == 1
    kinds = set(found["events_by_kind"])
    assert {"kill_meta_service", "kill_member", "stop_meta_service", "stop_member"} <= kinds


def test_no_request_notices_that_the_disk_of_the_local_store_is_full(
    results: dict[str, Result],
) -> None:
    found = results["disk"]
    assert found["problems"] == []
    assert found["requests"]["answered_from_pool"] > 0
