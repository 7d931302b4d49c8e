# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""The transfer engine on a store with faults: no failure of the pool gets past it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest

from ascend_direct.device import PASSED, Device
from ascend_direct.metrics import Metrics
from ascend_direct.page_layout import PageLayout, Span
from ascend_direct.store.base import PageStatus, StoreContext
from ascend_direct.transfer import StoreJob, TransferEngine, TransferLimits
from tests.fakes.memory_store import MemoryPool, MemoryStore
from tests.waiting import eventually

PAGES, LAYERS, SPAN_BYTES = 64, 3, 256


class Pool:
    """KV memory of one instance, its engine and its store."""

    def __init__(self, shared: MemoryPool, **limits: float) -> None:
        self.memory = np.zeros((LAYERS, PAGES, SPAN_BYTES), np.uint8)
        spans = tuple(
            Span(layer, "kv", self.memory[layer].ctypes.data, SPAN_BYTES, SPAN_BYTES)
            for layer in range(LAYERS)
        )
        self.layout = PageLayout(spans, PAGES, 16, "test")
        self.store = MemoryStore(shared)
        self.store.open(StoreContext(page_bytes=self.layout.page_bytes))
        self.metrics = Metrics()
        self.stored: list[str] = []
        bounds = {"lookup_timeout_s": 5.0, "load_timeout_s": 5.0, "store_timeout_s": 5.0}
        self.engine = TransferEngine(
            self.store,
            self.layout,
            Device("cpu"),
            TransferLimits(
                **{**bounds, **limits},  # type: ignore[arg-type]
                **{"store_queue_bytes": 1 << 20, "batch_bytes": 4 * self.layout.page_bytes}
                if "store_queue_bytes" not in limits
                else {"batch_bytes": 4 * self.layout.page_bytes},
            ),
            self.metrics,
            self.stored.extend,
        )
        self.engine.start()

    def fill(self, seed: int) -> None:
        self.memory[:] = np.random.default_rng(seed).integers(0, 256, self.memory.shape, np.uint8)

    def job(self, keys: Sequence[str], pages: Sequence[int]) -> StoreJob:
        return StoreJob(
            keys=list(keys),
            pages=lambda: np.array(pages),
            fence=PASSED,
            size_bytes=len(keys) * self.layout.page_bytes,
        )

    def put(self, keys: Sequence[str], pages: Sequence[int]) -> bool:
        self.engine.stores.submit(self.job(keys, pages))
        eventually(lambda: self.engine.stores.completed() > 0)
        return self.engine.stores.pop()


def pages_of(*numbers: int) -> Callable[[], np.ndarray]:
    return lambda: np.array(numbers)


@pytest.fixture
def shared() -> MemoryPool:
    return MemoryPool()


@pytest.fixture
def make(shared: MemoryPool) -> Iterator[Callable[..., Pool]]:
    made: list[Pool] = []

    def build(**limits: float) -> Pool:
        made.append(Pool(shared, **limits))
        return made[-1]

    yield build
    for pool in made:
        for fault in pool.store.faults.values():
            fault.release()
        pool.engine.close()


KEYS = [f"k{i}" for i in range(10)]


def test_what_one_instance_stores_another_loads_into_other_pages(make) -> None:
    a, b = make(), make()
    a.fill(1)
    assert a.put(KEYS, range(1, 11))
    assert b.engine.stored_prefix([*KEYS, "more"]) == 10
    assert b.engine.load(KEYS, lambda: np.arange(30, 20, -1), PASSED).landed
    for i in range(10):
        assert (b.memory[:, 30 - i] == a.memory[:, 1 + i]).all()
    assert not b.memory[:, [0, 20, 31]].any()


def test_a_transfer_is_cut_into_calls_of_even_size(make) -> None:
    a, calls = make(), []
    a.store.faults["put"].before = lambda keys: calls.append(len(keys))
    assert a.put(KEYS, range(1, 11))
    assert calls == [4, 4, 2]
    assert a.put([f"other{i}" for i in range(5)], range(1, 6))
    assert calls[3:] == [3, 2], "and not four and one"


def test_pages_the_pool_has_are_not_written_again(make) -> None:
    a, b = make(), make()
    a.fill(1)
    assert a.put(KEYS[:4], range(1, 5))
    assert b.put(KEYS, range(1, 11))
    counts = b.metrics.snapshot()
    assert (counts["store_pages"], counts["store_skipped_pages"]) == (6, 4)


def test_a_load_with_one_missing_page_is_refused_and_names_it(make, shared) -> None:
    a = make()
    a.put(KEYS, range(1, 11))
    shared.drop(KEYS[2])
    outcome = a.engine.load(KEYS[:4], pages_of(1, 2, 3, 4), PASSED)
    assert not outcome.landed
    assert KEYS[2] in outcome.bad_keys
    assert KEYS[0] not in outcome.bad_keys
    assert outcome.late is None


def test_a_load_that_stops_at_a_bad_batch_does_not_count_the_rest_as_delivered(
    make, shared
) -> None:
    a = make()
    a.put(KEYS, range(1, 11))
    shared.drop(KEYS[0])
    outcome = a.engine.load(KEYS, lambda: np.arange(1, 11), PASSED)
    assert not outcome.landed
    assert set(KEYS[4:]) <= set(outcome.bad_keys)  # batches of four: these were never read


def test_a_page_that_is_there_and_cannot_be_had_is_suspect_a_missing_one_is_not(
    make, shared
) -> None:
    a = make()
    a.put(KEYS, range(1, 11))
    shared.drop(KEYS[0])
    a.store.faults["get"].statuses = {
        KEYS[1]: PageStatus.MISMATCH,
        KEYS[2]: PageStatus.UNAVAILABLE,
        KEYS[3]: PageStatus.FAILED,
    }
    outcome = a.engine.load(KEYS, lambda: np.arange(1, 11), PASSED)
    assert outcome.suspect_keys == tuple(KEYS[1:4])
    assert set(outcome.bad_keys) == set(KEYS), "the next batches were not read"


def test_a_pool_that_raises_refuses_the_load(make) -> None:
    a = make()
    a.put(KEYS, range(1, 11))
    a.store.faults["get"].fails_after_keys = 2
    outcome = a.engine.load(KEYS[:4], pages_of(1, 2, 3, 4), PASSED)
    assert not outcome.landed
    assert outcome.late is None


def test_a_late_load_says_so_until_its_call_has_returned(make) -> None:
    a = make(load_timeout_s=0.05)
    a.put(KEYS, range(1, 11))
    a.store.faults["get"].hold()
    outcome = a.engine.load(KEYS[:4], pages_of(1, 2, 3, 4), PASSED)
    assert not outcome.landed
    assert outcome.late is not None
    assert not outcome.late.returned
    a.store.faults["get"].release()
    eventually(lambda: outcome.late.returned)


def test_while_a_call_hangs_the_next_load_is_refused_at_once(make) -> None:
    a = make(load_timeout_s=0.05)
    a.put(KEYS, range(1, 11))
    a.store.faults["get"].hold()
    a.engine.load(KEYS[:4], pages_of(1, 2, 3, 4), PASSED)
    begin = time.monotonic()
    outcome = a.engine.load(KEYS[4:8], pages_of(5, 6, 7, 8), PASSED)
    assert time.monotonic() - begin < 0.03
    assert not outcome.landed
    assert outcome.late is None  # nothing was started: its pages may be reused at once


def test_a_late_load_stops_at_the_next_batch(make) -> None:
    a = make(load_timeout_s=0.05)
    a.put(KEYS, range(1, 11))
    a.store.faults["get"].hold()
    a.engine.load(KEYS, lambda: np.arange(1, 11), PASSED)
    a.store.faults["get"].release()
    a.engine.quiesce()
    assert a.store.counts["get"].keys <= 4


def test_a_lookup_past_its_deadline_is_unknown(make) -> None:
    a = make(lookup_timeout_s=0.05)
    a.store.faults["exists"].hold()
    assert a.engine.stored_prefix(KEYS) is None
    assert a.metrics.snapshot()["lookups_timed_out"] == 1


def test_after_a_run_of_failures_the_pool_is_left_alone(make) -> None:
    a = make()
    a.store.faults["exists"].fails_after_keys = 0
    for _ in range(10):
        assert a.engine.stored_prefix(KEYS) is None
    assert a.store.counts["exists"].calls <= 4
    assert a.metrics.snapshot()["breaker_opened"] == 1


def test_stores_leave_a_failing_pool_alone_and_notice_that_it_is_back(make) -> None:
    a = make()
    a.store.faults["exists"].fails_after_keys = 0
    for i in range(10):
        assert not a.put([f"x{i}"], [1])
    assert a.store.counts["exists"].calls <= 4
    a.store.faults["exists"].fails_after_keys = None
    eventually(lambda: a.put(["back"], [1]))
    assert a.put(["and closed"], [2])


def test_a_put_that_does_not_answer_for_every_page_is_a_failed_store_and_no_surprise(
    make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    a = make()
    whole = a.store.put
    monkeypatch.setattr(a.store, "put", lambda keys, pages: whole(keys, pages)[:-1])
    assert not a.put(KEYS[:3], [1, 2, 3])
    assert a.metrics.snapshot()["store_failed_pages"] == 3
    assert a.stored == []
    assert not [record for record in caplog.records if record.exc_info]


def test_results_of_stores_come_in_the_order_of_submission(make) -> None:
    a = make()
    a.store.faults["put"].statuses["b"] = PageStatus.FULL
    for i, key in enumerate("abcd"):
        a.engine.stores.submit(a.job([key], [i + 1]))
    a.engine.stores.submit(a.job([], []))
    eventually(lambda: a.engine.stores.completed() == 5)
    assert [a.engine.stores.pop() for _ in range(5)] == [True, False, True, True, True]
    assert a.stored == ["a", "c", "d"]


def test_a_store_that_does_not_fit_beside_the_running_one_fails_in_its_turn(make) -> None:
    a = make(store_queue_bytes=4 * LAYERS * SPAN_BYTES)
    a.store.faults["put"].hold()
    a.engine.stores.submit(a.job(["a", "b", "c"], [1, 2, 3]))
    assert a.store.faults["put"].entered.wait(5)
    a.engine.stores.submit(a.job(["d", "e"], [4, 5]))
    a.engine.stores.submit(a.job(["f"], [6]))
    assert a.engine.stores.completed() == 0  # first in, first out
    a.store.faults["put"].release()
    eventually(lambda: a.engine.stores.completed() == 3)
    assert [a.engine.stores.pop() for _ in range(3)] == [True, False, True]
    assert a.metrics.snapshot()["stores_dropped_queue_full"] == 1
    assert a.engine.stores.held_bytes == 0


def test_a_full_queue_gives_up_what_has_waited_longest(make) -> None:
    a = make(store_queue_bytes=4 * LAYERS * SPAN_BYTES)
    a.store.faults["put"].hold()
    a.engine.stores.submit(a.job(["a"], [1]))
    assert a.store.faults["put"].entered.wait(5)
    for keys, pages in ((["b"], [2]), (["c", "d"], [3, 4]), (["e", "f"], [5, 6])):
        a.engine.stores.submit(a.job(keys, pages))
    assert a.engine.stores.held_bytes == 3 * LAYERS * SPAN_BYTES, "a runs, e and f wait"
    a.store.faults["put"].release()
    eventually(lambda: a.engine.stores.completed() == 4)
    assert [a.engine.stores.pop() for _ in range(4)] == [True, False, False, True]
    assert a.metrics.snapshot()["stores_dropped_queue_full"] == 2
    assert a.stored == ["a", "e", "f"]


def test_a_pool_that_does_not_answer_pins_queued_stores_for_a_loads_deadline_only(make) -> None:
    a = make(lookup_timeout_s=0.01, load_timeout_s=0.2, store_timeout_s=60.0)
    for name in ("put", "exists"):
        a.store.faults[name].hold()
    for number in range(3):
        a.engine.stores.submit(a.job([f"page {number}"], [number + 1]))
    assert a.store.faults["exists"].entered.wait(5)
    time.sleep(0.3)
    assert not a.engine.stores.head_is_late()  # nothing says yet that the pool is in trouble
    for _ in range(3):
        assert a.engine.stored_prefix(["x"]) is None
    assert a.engine.in_trouble
    eventually(a.engine.stores.head_is_late)
    a.engine.stores.surrender_head()
    eventually(lambda: a.engine.stores.completed() == 3)
    assert a.metrics.snapshot()["stores_dropped_deadline"] == 2
    for name in ("put", "exists"):
        a.store.faults[name].release()


def test_one_node_larger_than_the_queue_is_stored_when_the_queue_is_empty(make) -> None:
    a = make(store_queue_bytes=1)
    assert a.put(["a", "b"], [1, 2])


def test_a_queued_store_is_dropped_at_its_deadline_a_started_one_is_not(make) -> None:
    a = make(store_timeout_s=0.1)
    a.store.faults["put"].hold()
    a.engine.stores.submit(a.job(["a"], [1]))
    assert a.store.faults["put"].entered.wait(5)
    a.engine.stores.submit(a.job(["b"], [2]))
    eventually(a.engine.stores.head_is_late)
    eventually(
        lambda: (
            a.engine.stores.completed() == 0
            and a.metrics.snapshot()["stores_dropped_deadline"] == 1
        )
    )
    returned = a.engine.stores.surrender_head()
    assert a.engine.stores.completed() == 2
    assert [a.engine.stores.pop(), a.engine.stores.pop()] == [False, False]
    assert not returned.is_set()  # its bytes are still being read
    a.engine.stores.submit(a.job(["c"], [3]))
    assert a.engine.stores.completed() == 1  # nothing is pinned behind a call that hangs
    assert not a.engine.stores.pop()
    a.store.faults["put"].release()
    assert returned.wait(5)


def test_quiesce_waits_for_the_call_under_way_and_drops_the_rest(make) -> None:
    a = make()
    a.store.faults["put"].hold()
    a.engine.stores.submit(a.job(["a"], [1]))
    assert a.store.faults["put"].entered.wait(5)
    a.engine.stores.submit(a.job(["b"], [2]))
    done = threading.Event()
    waiter = threading.Thread(target=lambda: (a.engine.quiesce(), done.set()))
    waiter.start()
    assert not done.wait(0.1)
    a.store.faults["put"].release()
    assert done.wait(5)
    waiter.join()
    assert a.engine.stores.completed() == 0
    assert "b" not in a.store.pool


def test_reads_that_fail_open_a_breaker_of_their_own_although_lookups_work(make) -> None:
    a = make()
    a.put(KEYS, range(1, 11))
    a.store.faults["get"].fails_after_keys = 0
    for _ in range(10):
        assert a.engine.stored_prefix(KEYS) == 10
        assert not a.engine.load(KEYS[:1], pages_of(1), PASSED).landed
    assert a.store.counts["get"].calls <= 4
    assert not a.engine.may_load
    a.store.faults["get"].fails_after_keys = None
    eventually(lambda: a.engine.may_load)
    assert a.engine.load(KEYS[:1], pages_of(1), PASSED).landed


def test_while_a_read_hangs_no_load_would_be_tried(make) -> None:
    a = make(load_timeout_s=0.05)
    a.put(KEYS, range(1, 11))
    a.store.faults["get"].hold()
    a.engine.load(KEYS[:1], pages_of(1), PASSED)
    assert not a.engine.may_load
    a.store.faults["get"].release()
    eventually(lambda: a.engine.may_load)


def test_a_slow_forward_is_not_held_against_the_pool(make) -> None:
    a = make(load_timeout_s=0.03)
    a.put(KEYS, range(1, 11))
    release = threading.Event()

    class Forward:
        def wait(self) -> None:
            release.wait(5)

    for _ in range(4):
        release.clear()
        outcome = a.engine.load(KEYS[:1], pages_of(1), Forward())
        assert not outcome.landed
        release.set()
        eventually(lambda: outcome.late.returned)  # noqa: B023
    assert a.metrics.snapshot()["breaker_opened"] == 0


def test_a_fence_passes_before_the_first_byte_is_written(make) -> None:
    a, order = make(), []

    class Gate:
        def wait(self) -> None:
            order.append("fence")

    a.put(KEYS[:1], [1])
    a.store.faults["get"].before = lambda keys: order.append("get")
    assert a.engine.load(KEYS[:1], pages_of(2), Gate()).landed
    assert order == ["fence", "get"]


def test_closing_while_a_call_hangs_is_bounded(make) -> None:
    a = make()
    a.store.faults["put"].hold()
    a.engine.stores.submit(a.job(["a"], [1]))
    assert a.store.faults["put"].entered.wait(5)
    begin = time.monotonic()
    a.engine.close(timeout_s=0.1)
    assert time.monotonic() - begin < 1.0


def test_a_load_does_not_wait_behind_stores(make) -> None:
    a = make()
    a.put(KEYS, range(1, 11))
    a.store.faults["put"].hold()
    for i in range(20):
        a.engine.stores.submit(a.job([f"x{i}"], [1]))
    assert a.store.faults["put"].entered.wait(5)
    assert a.engine.load(KEYS[:4], pages_of(20, 21, 22, 23), PASSED).landed
    assert not a.store.faults["put"]._gate.is_set(), "the stores are still under way"


def test_while_the_breaker_is_open_no_call_and_no_thread_is_troubled(make) -> None:
    a = make()
    a.store.faults["exists"].fails_after_keys = 0
    while not a.engine.in_trouble:
        a.engine.stored_prefix(KEYS)
    a.engine._breaker._closed_again_at_s += 3600.0
    calls, ticket = a.store.counts["exists"].calls, a.engine._asking._current
    for _ in range(1000):
        assert a.engine.stored_prefix(KEYS) is None
    assert a.store.counts["exists"].calls == calls
    assert a.engine._asking._current is ticket, "the scheduler did not even hand a call over"


def test_nothing_grows_while_the_pool_never_answers(make) -> None:
    limit_bytes = 8 * LAYERS * SPAN_BYTES
    a = make(
        store_queue_bytes=limit_bytes,
        lookup_timeout_s=0.01,
        load_timeout_s=0.01,
        store_timeout_s=0.02,
    )
    for fault in a.store.faults.values():
        fault.hold()
    threads = threading.active_count()
    a.engine.stores.submit(a.job(["hangs"], [2]))
    assert a.store.faults["exists"].entered.wait(5)

    def all_reported() -> bool:  # as the cache does in its rounds
        if a.engine.stores.head_is_late():
            a.engine.stores.surrender_head()
        for _ in range(a.engine.stores.completed()):
            a.engine.stores.pop()
        return not a.engine.stores._unreported

    for i in range(300):
        a.engine.stored_prefix([f"l{i}"])
        a.engine.load([f"l{i}"], pages_of(1), PASSED)
        a.engine.stores.submit(a.job([f"s{i}"], [2]))
        all_reported()
        assert a.engine.stores.held_bytes <= limit_bytes
    eventually(all_reported)
    a.engine.stores.submit(a.job(["behind a call that hangs"], [2]))
    assert all_reported()
    assert not a.engine.stores._waiting
    assert a.engine.stores.held_bytes <= LAYERS * SPAN_BYTES, "the pages of the call that hangs"
    assert threading.active_count() == threads
    assert a.store.counts["exists"].calls <= 2, "one lookup and one store hang; nobody else asks"
    assert a.store.counts["get"].calls <= 1


def test_close_ends_all_threads(make) -> None:
    before = set(threading.enumerate())  # another test's hung store may keep its own for minutes
    a = make()
    assert set(threading.enumerate()) - before, "an engine has threads"
    a.engine.close()
    eventually(lambda: not set(threading.enumerate()) - before)
