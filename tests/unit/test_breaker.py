# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""The breaker opens after a run of failures, probes after growing pauses, closes on success."""

from __future__ import annotations

from ascend_direct.transfer.breaker import Breaker


def opened(now_s: float = 0.0, **kw: float) -> Breaker:
    breaker = Breaker(failures_to_open=3, first_pause_s=1.0, longest_pause_s=4.0, seed=1, **kw)
    assert [breaker.failed(now_s) for _ in range(3)] == [False, False, True]
    return breaker


def test_single_failures_do_not_open_it() -> None:
    breaker = Breaker(failures_to_open=3)
    for _ in range(10):
        breaker.failed(0.0)
        breaker.failed(0.0)
        breaker.succeeded()
    assert breaker.allow(0.0)
    assert not breaker.is_open


def test_while_open_only_one_probe_per_pause_is_allowed() -> None:
    breaker = opened()
    assert not breaker.allow(0.5)
    assert breaker.allow(2.0)
    assert not breaker.allow(2.1)


def test_a_good_probe_closes_it() -> None:
    breaker = opened()
    assert breaker.allow(2.0)
    breaker.succeeded()
    assert breaker.allow(2.0)
    assert not breaker.is_open


def test_pauses_double_up_to_a_bound() -> None:
    breaker = opened()
    now_s, pauses = 0.0, []
    for _ in range(6):
        start_s = now_s
        while not breaker.allow(now_s):
            now_s += 0.01
        pauses.append(now_s - start_s)
        assert breaker.failed(now_s) is False
    assert pauses[1] > pauses[0]
    assert max(pauses) <= 4.0 * 1.25 + 0.02


def test_probes_of_two_servers_do_not_fall_together() -> None:
    first, second = Breaker(1, 1.0, seed=1), Breaker(1, 1.0, seed=2)
    first.failed(0.0)
    second.failed(0.0)
    moments = []
    for breaker in (first, second):
        now_s = 0.0
        while not breaker.allow(now_s):
            now_s += 0.001
        moments.append(now_s)
    assert abs(moments[0] - moments[1]) > 0.01
