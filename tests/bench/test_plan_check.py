# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""scripts/plan_check: its arithmetic, and a small run whose hits must be the predicted ones.

Times of a small model on a busy machine say nothing; the full run's are in docs/benchmarks.md.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
from measured_plan import __main__ as plan_check
from measured_plan import calibrate, compare, replay
from measured_plan.calibrate import Probe
from measured_plan.others import Others

from ascend_direct.cli.planning.traces import Request, Trace


def test_least_squares_finds_lines_and_leaves_out_what_would_be_negative() -> None:
    rows = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 4.0]])
    assert calibrate.not_negative(rows, rows @ [3.0, 2.0]) == pytest.approx([3, 2])
    assert calibrate.not_negative(rows, np.array([1.0, 3.0, 7.0]))[0] == 0


def test_the_cost_of_loads_is_what_a_pool_hit_takes_longer_than_a_device_hit() -> None:
    probes = [
        probe
        for cached in (100, 200, 400)
        for probe in (
            Probe("device", 10, cached, 0, 1.0),
            Probe("pool", 10, 0, cached, 1.0 + 0.005 + 1e-5 * cached),
            Probe("cold", 10 + cached, 0, 0, 2.0),
        )
    ]
    assert calibrate.fit_loads(probes) == pytest.approx((5, 10))


def test_units_of_one_name_have_the_same_tokens_and_prompts_their_length() -> None:
    first = replay.prompt_of(Request(0, 40, 0, (1, 2), 16), 16, number=1)
    other = replay.prompt_of(Request(0, 40, 0, (1, 3), 16), 16, number=2)
    assert len(first) == len(other) == 40
    assert first[:16] == other[:16]
    assert first[16:] != other[16:]


def test_pace_keeps_the_order_and_sets_the_mean_gap() -> None:
    trace = Trace("test", [Request(n, 1, 0, (n,), 16) for n in range(2000)], 16, 16)
    timed = replay.at_pace(trace, 0.5, seed=1)
    assert [r.units for r in timed.requests] == [r.units for r in trace.requests]
    assert timed.span_s / 2000 == pytest.approx(0.5, rel=0.1)


def test_a_figure_outside_the_limit_is_marked() -> None:
    found = compare.rounded([compare.Figure("a", " ms", 100, 120), compare.Figure("b", "", 0, 0)])
    assert [figure["percent"] for figure in found] == [20, 0]
    assert "| a | 100 ms | 120 ms | +20.0 % |" in compare.markdown(found)


def test_cpu_time_of_other_programs_is_told_from_our_own() -> None:
    others, begin_s = Others(), time.monotonic()
    end_s = time.process_time() + 0.5
    while time.process_time() < end_s:
        pass
    percent, cores_s = others.percent(), (time.monotonic() - begin_s) * (os.cpu_count() or 1)
    assert 0 <= percent <= 100 * (1 - 0.5 / cores_s) + 5


@pytest.mark.e2e
@pytest.mark.sglang
@pytest.mark.memcache
@pytest.mark.timeout(400)
def test_real_servers_find_exactly_the_tokens_that_are_predicted(tmp_path: Path) -> None:
    small = ["--size", "tiny", "--requests", "24", "--longest", "1024", "--device-tokens", "4096"]
    probes = ["--lengths", "300", "700", "--rounds", "1", "--one-by-one"]
    assert plan_check.main([*small, *probes, "--out", str(tmp_path)]) in (0, 1)  # times may differ
    found = json.loads((tmp_path / "result.json").read_text())
    (measured,) = found["measured"]
    assert [m[:2] for m in measured] == [p[:2] for p in found["predicted"]]
    device, pool = (sum(m[tier] for m in measured) for tier in (0, 1))
    assert device > 0 < pool
    assert json.loads((tmp_path / "costs.json").read_text())["compute_us_per_token"] > 0
