# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""The schedule and the judges of a chaos run, without any process."""

from __future__ import annotations

import pytest

from ascend_direct.store.base import PageStatus

from .events import POOL_KINDS, REQUEST_KINDS, STORE_MODES, Event, Pace, schedule
from .invariants import Resources, Stalls, alarms

TRACKS = ("store", "requests", "pool", "server")


def half_an_hour(seed: int) -> list[Event]:
    return schedule(seed, 1800.0, Pace(), TRACKS)


def test_the_same_seed_gives_the_same_events_and_another_gives_others() -> None:
    assert half_an_hour(1) == half_an_hour(1)
    assert half_an_hour(1) != half_an_hour(2)


@pytest.mark.parametrize("seed", range(20))
def test_half_an_hour_has_a_thousand_events_in_order_of_time_and_of_every_kind(seed: int) -> None:
    events = half_an_hour(seed)
    assert 1_000 <= len(events) <= 1_300
    assert events == sorted(events, key=lambda event: event.at_s)
    assert {e.kind for e in events} == {"store", *REQUEST_KINDS, *POOL_KINDS, "kill_server"}
    met = {(e.target, e.mode.split()[0]) for e in events if e.kind == "store"}
    assert met == {(op, mode.split()[0]) for op, modes in STORE_MODES.items() for mode in modes}
    assert max(event.lasts_s for event in events) <= 20.0


def test_faults_that_answer_name_statuses_that_exist() -> None:
    for modes in STORE_MODES.values():
        for mode in modes:
            kind, _, status = mode.partition(" ")
            if kind in ("answer", "some"):
                assert PageStatus(status) is not PageStatus.OK


def test_a_stall_past_its_deadline_is_found_and_what_the_machine_delayed_is_not() -> None:
    lines = ["lookup 0.25 0.0", "lookup 0.95 0.0", "init_load_back 1.6 0.0", "reset 60.0 0.0"]
    lines += ["init_load_back 2.9 1.5"]
    stalls = Stalls.read(lines, lookup_timeout_s=0.3, load_timeout_s=1.2)
    assert [line.split(" in ")[1].split(",")[0] for line in stalls.too_long] == ["lookup"]
    assert len(stalls.seconds["init_load_back"]) == 2


def test_a_traceback_that_was_injected_is_no_alarm_and_any_other_is() -> None:
    def traceback(error: str) -> list[str]:
        return ["Traceback (most recent call last):", '  File "x.py", line 1', error]

    assert not alarms(traceback("RuntimeError: injected by a test"))
    assert alarms(traceback("RuntimeError: something else"))
    assert alarms(["token_to_kv_pool_allocator memory leak detected!"])


def test_threads_that_grow_beyond_the_allowance_are_a_leak() -> None:
    base = Resources({"scheduler": 40}, {"scheduler": 100})
    assert not Resources({"scheduler": 42}, {"scheduler": 104}).grown(base)
    (found,) = Resources({"scheduler": 60}, {"scheduler": 100}).grown(base)
    assert found.startswith("threads")
