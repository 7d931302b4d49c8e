# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""A load that fails, in whatever way, is a recompute: right answers, no slot lost or reused."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from ascend_direct.store.base import PageStatus
from tests.waiting import eventually

from .audit import audit, drain
from .prompts import counts, evict_all, prompt, serve_and_store

CORES = ("rust", "python")
TOKENS = prompt(200)
# Long enough that the call has begun when it is left, on a busy machine too.
SHORT = {"load_timeout_ms": 150}


def _drop_one_after_lookup(b) -> None:
    def drop(keys) -> None:
        b.store.pool.drop(keys[5])

    b.store.faults["get"].before = drop


def _raise_half_way(b) -> None:
    b.store.faults["get"].fails_after_keys = 3


def _fail_one_page(b) -> None:
    for key in b.store.pool.keys()[4:5]:
        b.store.faults["get"].statuses[key] = PageStatus.UNAVAILABLE


def _return_short(b) -> None:
    whole = b.store.get
    b.store.get = lambda keys, pages: whole(keys, pages)[:-2]


def _raise_what_no_store_may(b) -> None:
    def crash(keys) -> None:
        raise RuntimeError("a provider with a bug")

    b.store.faults["get"].before = crash


FAILURES = (
    _drop_one_after_lookup,
    _raise_half_way,
    _fail_one_page,
    _return_short,
    _raise_what_no_store_may,
)


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("fail", FAILURES, ids=lambda f: f.__name__)
def test_a_load_that_fails_is_recomputed(make, core, fail) -> None:
    a, b = make(core=core), make(core=core)
    first = serve_and_store(a, TOKENS)
    fail(b)
    served = serve_and_store(b, TOKENS)
    assert served.tokens == first.tokens
    assert served.tiers == {"device": 0, "host": 0, "storage": 0}
    assert counts(b)["loads_failed"] == 1
    assert b.controller.quarantined_tokens == 0


def test_a_page_lost_after_the_lookup_is_stored_again_by_who_recomputed_it(make) -> None:
    a, b, c = make(), make(), make()
    serve_and_store(a, TOKENS)
    _drop_one_after_lookup(b)
    serve_and_store(b, TOKENS)
    assert serve_and_store(c, TOKENS).tiers["storage"] == 192


@pytest.mark.parametrize("operation", ["exists", "get", "put"])
def test_a_store_that_breaks_its_contract_never_reaches_the_scheduler(make, operation) -> None:
    a, b = make(), make()
    serve_and_store(a, TOKENS)

    def crash(keys) -> None:
        raise OSError("not a StoreError")

    b.store.faults[operation].before = crash
    for seed in range(3):
        serve_and_store(b, TOKENS[:128] + prompt(60, seed=seed))
        evict_all(b)


def test_a_lookup_answered_for_some_keys_only_is_a_miss(make) -> None:
    a, b = make(), make()
    serve_and_store(a, TOKENS)
    whole = b.store.exists
    b.store.exists = lambda keys: whole(keys)[:-2]
    assert serve_and_store(b, TOKENS[:140]).tiers["storage"] == 0
    assert counts(b)["stores"] == 0  # what is not known to be stored is not believed either
    del b.store.exists


def _start_late_load(b, tokens=TOKENS):
    """A load whose native call outlives its deadline; returns the request, now recomputed."""
    b.store.faults["get"].hold()
    served = b.submit(tokens, new_tokens=4)
    assert b.prefill(served)
    assert b.store.faults["get"].entered.is_set()
    assert b.controller.quarantined_tokens == 192
    return served


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("kind", ["gqa", "mla"])
def test_slots_of_a_late_load_are_withheld_until_its_call_returns(make, core, kind) -> None:
    a = make(core=core, kind=kind)
    b = make(core=core, kind=kind, tokens=640, config=SHORT)
    first = serve_and_store(a, TOKENS)
    served = _start_late_load(b)
    withheld = b.controller._quarantine[0].slots.numpy()
    audit(b)
    assert b.tree.protected_size() >= 192
    # Everything that is left is used, and nothing of it is what the late call will write to.
    others = [prompt(100, seed=s) for s in range(1, 7)]
    for other in others:
        eventually(lambda: b.controller.engine.stores.held_bytes == 0)  # what is queued is pinned
        b.serve(other)
        audit(b)
    assert not b.planes[0].memory[withheld].all()
    b.store.faults["get"].release()
    late = b.controller._quarantine[0].outcome.late
    assert late.wait(5)
    b.check_slots(withheld, served.states[:192])  # the late call did write
    free = b.allocator.available_size()
    b.round()
    assert b.controller.quarantined_tokens == 0
    assert b.allocator.available_size() == free + 192
    audit(b)
    while b.requests:
        b.decode(served)
    assert served.tokens[:201] == first.tokens[:201]
    for other in others:  # bytes of what is cached are compared here
        b.serve(other)


def test_while_a_call_hangs_requests_recompute_at_once(make) -> None:
    a, b = make(), make(config=SHORT, tokens=1600)
    serve_and_store(a, TOKENS)
    serve_and_store(a, prompt(200, seed=1))
    served = _start_late_load(b)
    begin = time.monotonic()
    other = b.serve(prompt(200, seed=1))
    assert time.monotonic() - begin < 1.0
    assert other.tiers["storage"] == 0
    assert b.controller.quarantined_tokens == 192
    audit(b)
    b.store.faults["get"].release()
    drain(b)
    b.abort(served)


def test_after_a_late_load_has_returned_loads_work_again(make) -> None:
    a, b = make(), make(config=SHORT)
    serve_and_store(a, TOKENS)
    b.abort(_start_late_load(b))
    b.store.faults["get"].release()
    drain(b)
    evict_all(b)
    b.controller.engine._limits = a.controller.engine._limits
    assert serve_and_store(b, TOKENS).tiers["storage"] == 192


def test_a_late_load_that_meets_a_full_device_pool_waits_instead_of_failing(make) -> None:
    a, b = make(), make(config=SHORT, tokens=320)
    serve_and_store(a, TOKENS)
    b.store.faults["get"].hold()
    served = b.submit(TOKENS)
    assert not b.prefill(served)  # 192 of 320 slots are withheld: no room to recompute
    audit(b)
    assert not b.prefill(served)
    b.store.faults["get"].release()
    drain(b)
    assert b.prefill(served)
    audit(b)
    b.abort(served)


def test_a_flush_waits_for_a_late_load_and_for_stores(make, shared) -> None:
    a, b = make(), make(config=SHORT)
    serve_and_store(a, TOKENS)
    b.store.faults["put"].hold()
    b.abort(_start_late_load(b))
    b.serve(prompt(100, seed=1))
    assert b.store.faults["put"].entered.wait(5)
    kept = set(shared.keys())
    flushed = threading.Event()

    def release() -> None:
        assert not flushed.wait(0.3), "the flush did not wait for native calls"
        b.store.faults["get"].release()
        b.store.faults["put"].release()

    releaser = threading.Thread(target=release)
    releaser.start()
    b.flush()
    flushed.set()
    releaser.join()
    audit(b)
    assert b.allocator.available_size() == b.allocator.size
    assert kept <= set(shared.keys())
    before = [plane.memory.copy() for plane in b.planes]
    time.sleep(0.05)
    for plane, memory in zip(b.planes, before, strict=True):
        assert np.array_equal(plane.memory, memory)
    b.controller.engine._limits = a.controller.engine._limits
    assert serve_and_store(b, TOKENS).tiers["storage"] == 192


def test_closing_with_a_late_load_in_flight_is_quiet(make) -> None:
    a, b = make(), make(config=SHORT)
    serve_and_store(a, TOKENS)
    b.abort(_start_late_load(b))
    threading.Timer(0.1, b.store.faults["get"].release).start()
    b.close()
    eventually(lambda: b.store.closes == 1)
