# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Write-back: when it starts, what it pins, what becomes of it when the pool fails or hangs."""

from __future__ import annotations

import threading
import time

import pytest
from sglang.srt.mem_cache.base_prefix_cache import EvictParams

from ascend_direct.device import Device
from ascend_direct.integration.radix_cache import LATE_STORE_ROUNDS
from ascend_direct.store.base import PageStatus
from tests.waiting import eventually

from .audit import audit, check_pool, drain
from .instance import Instance
from .prompts import counts, evict_all, prompt, serve_and_store

CORES = ("rust", "python")
TOKENS = prompt(200)


class GatedDevice(Device):
    """A device whose work is done when the test says so."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.gate = threading.Event()

    def fence(self, forward_stream=None):
        return self.gate


@pytest.mark.parametrize("core", CORES)
def test_a_store_waits_until_the_forward_has_written_its_pages(make, core) -> None:
    a, b = make(core=core), make(core=core)
    device = GatedDevice()
    a.controller._device = device
    compute, postponed = a._compute, []
    a._compute = lambda *work: postponed.append(work)
    served = a.submit(TOKENS, new_tokens=1)
    a.prefill(served)  # checkpointed and released while its forward is "still running"
    time.sleep(0.05)
    assert a.store.counts["put"].calls == 0
    audit(a)
    row = a.tree.tree_core.all_values_flatten()
    assert len(row) == 192
    a.slots = lambda served, end: _path_of(a, served)[:end]
    for work in postponed:
        compute(work[0], 0, 192)
    device.gate.set()
    drain(a)
    check_pool(a)
    assert serve_and_store(b, TOKENS).tiers["storage"] == 192


def _path_of(instance: Instance, served):
    node = served.req.last_node
    return instance.tree.path_device_indices(node).numpy()


def test_a_load_waits_until_the_forward_has_left_recycled_pages(make) -> None:
    a, b = make(), make()
    serve_and_store(a, TOKENS)
    device, order = GatedDevice(), []
    b.controller._device = device
    b.store.faults["get"].before = lambda keys: order.append("read")
    timer = threading.Timer(0.1, lambda: (order.append("forward"), device.gate.set()))
    timer.start()
    assert serve_and_store(b, TOKENS).tiers["storage"] == 192
    timer.join()
    assert order == ["forward", "read"]


@pytest.mark.parametrize("core", CORES)
def test_a_node_is_pinned_until_its_store_has_ended(make, core) -> None:
    a = make(core=core)
    a.store.faults["put"].hold()
    a.serve(TOKENS)
    assert a.tree.protected_size() == 192
    a.tree.evict(EvictParams(num_tokens=a.allocator.size))
    assert a.tree.protected_size() == 192
    audit(a)
    a.store.faults["put"].release()
    drain(a)
    assert a.tree.protected_size() == 0
    evict_all(a)


@pytest.mark.parametrize("core", CORES)
def test_a_node_split_while_its_store_runs_stays_pinned(make, core) -> None:
    a = make(core=core)
    a.store.faults["put"].hold()
    a.serve(TOKENS)
    a.serve(TOKENS[:100] + prompt(80, seed=1))  # splits the node that is being stored
    audit(a)
    a.tree.evict(EvictParams(num_tokens=a.allocator.size))
    audit(a)
    a.store.faults["put"].release()
    drain(a)
    check_pool(a)
    evict_all(a)
    assert serve_and_store(a, TOKENS).tiers["storage"] == 192


@pytest.mark.parametrize("fail", ["raise", "full", "unavailable"])
def test_a_store_that_fails_costs_nothing_and_is_tried_again(make, fail) -> None:
    a, b = make(), make()
    put = a.store.faults["put"]
    if fail == "raise":
        put.fails_after_keys = 4
    served = a.submit(TOKENS)
    if fail != "raise":
        status = PageStatus.FULL if fail == "full" else PageStatus.UNAVAILABLE
        put.statuses |= dict.fromkeys(a.keys(served, 192)[6:], status)
    a.prefill(served)
    a.abort(served)
    drain(a)
    audit(a)
    assert counts(a)["store_failed_pages"] > 0
    put.fails_after_keys = None
    put.statuses.clear()
    evict_all(a)
    serve_and_store(a, TOKENS)
    assert serve_and_store(b, TOKENS).tiers["storage"] == 192


@pytest.mark.parametrize("core", CORES)
def test_a_store_without_room_beside_the_running_one_is_dropped_in_its_turn(make, core) -> None:
    a = make(core=core)
    queue = a.controller.engine.stores
    queue._limit_bytes = 20 * a.controller.layout.page_bytes
    a.store.faults["put"].hold()
    a.serve(TOKENS)
    a.serve(prompt(200, seed=1))
    audit(a)
    assert counts(a)["stores_dropped_queue_full"] >= 1
    assert a.tree.linker.pending_offloads, "a dropped store is still reported, in its turn"
    assert queue.completed() == 0
    a.store.faults["put"].release()
    drain(a)
    assert queue.held_bytes == 0
    assert len(a.store.pool) == 12


def test_a_store_that_was_dropped_is_stored_when_the_prefix_is_used_again(make) -> None:
    a = make()
    queue = a.controller.engine.stores
    queue._held_bytes += queue._limit_bytes  # others have filled it
    serve_and_store(a, TOKENS)
    assert len(a.store.pool) == 0
    queue._held_bytes -= queue._limit_bytes
    serve_and_store(a, TOKENS)
    assert len(a.store.pool) == 12


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("kind", ["gqa", "mla"])
def test_a_store_that_hangs_is_given_up_and_its_pages_stay_pinned(make, core, kind) -> None:
    a = make(core=core, kind=kind, tokens=640, config={"store_timeout_ms": 50})
    a.store.faults["put"].hold()
    hung = a.serve(TOKENS)
    assert a.store.faults["put"].entered.wait(5)
    a.serve(prompt(100, seed=1))  # queued behind it
    time.sleep(0.06)
    for _ in range(LATE_STORE_ROUNDS):
        a.round()
    audit(a)
    assert a.tree.linker.pending_offloads == [], "later nodes are set free"
    assert a.tree.protected_size() == 192, "the hung one's pages are not"
    assert counts(a)["stores_late"] == 1
    assert counts(a)["stores_dropped_deadline"] >= 1
    # Recycle everything that may be recycled before the call reads the pages.
    for seed in range(2, 7):
        a.serve(prompt(200, seed=seed))
        audit(a)
        eventually(lambda: (a.round(), not a.tree.linker.pending_offloads)[1])
    a.store.faults["put"].release()
    drain(a)
    audit(a)
    assert a.tree.protected_size() == 0
    stored = a.keys(hung, 192)
    assert all(key in a.store.pool for key in stored)
    check_pool(a)  # each holds the prefix its key names, not what was computed since


def test_stores_work_again_after_one_hung(make) -> None:
    a, b = make(config={"store_timeout_ms": 50}), make()
    a.store.faults["put"].hold()
    a.serve(TOKENS)
    time.sleep(0.06)
    for _ in range(2 * LATE_STORE_ROUNDS):
        a.round()
    a.store.faults["put"].release()
    drain(a)
    serve_and_store(a, prompt(200, seed=1))
    assert serve_and_store(b, prompt(200, seed=1)).tiers["storage"] == 192


@pytest.mark.parametrize("core", CORES)
def test_a_flush_with_a_given_up_store_waits_for_it(make, core, shared) -> None:
    a = make(core=core, config={"store_timeout_ms": 50})
    a.store.faults["put"].hold()
    a.serve(TOKENS)
    time.sleep(0.06)
    for _ in range(LATE_STORE_ROUNDS):
        a.round()
    assert a.tree.late_stores
    threading.Timer(0.1, a.store.faults["put"].release).start()
    a.flush()
    assert a.tree.late_stores == []
    audit(a)
    assert a.allocator.available_size() == a.allocator.size
    check_pool(a)
    assert len(shared) == 12, "flushing the device cache leaves the pool alone"
    assert serve_and_store(a, TOKENS).tiers["storage"] == 192


def test_a_flush_drops_stores_that_are_queued(make, shared) -> None:
    a = make()
    a.store.faults["put"].hold()
    a.serve(TOKENS)
    assert a.store.faults["put"].entered.wait(5)
    a.serve(prompt(200, seed=1))
    threading.Timer(0.1, a.store.faults["put"].release).start()
    a.flush()
    audit(a)
    assert len(shared) == 12
    assert a.controller.engine.stores.held_bytes == 0
    check_pool(a)


def test_closing_while_stores_are_in_flight_ends_every_thread(make) -> None:
    a = make()
    a.store.faults["put"].hold()
    a.serve(TOKENS)
    assert a.store.faults["put"].entered.wait(5)
    threading.Timer(0.1, a.store.faults["put"].release).start()
    a.close()
    eventually(lambda: a.store.closes == 1)
    a.close()


def test_two_instances_that_compute_the_same_prompt_store_it_once(make) -> None:
    a, b = make(), make()
    a.store.faults["put"].hold()
    a.serve(TOKENS)
    serve_and_store(b, TOKENS)
    a.store.faults["put"].release()
    drain(a)
    assert len(a.store.pool) == 12
    check_pool(a)
