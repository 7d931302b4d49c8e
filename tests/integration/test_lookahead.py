# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Look-ahead: what a waiting request is given before it is scheduled, and what can go wrong."""

from __future__ import annotations

import random

import pytest
from sglang.srt.mem_cache.base_prefix_cache import EvictParams

from ascend_direct.integration import lookahead
from tests.waiting import eventually

from .audit import audit, check_at_rest, check_pool, drain
from .prompts import counts, prompt, serve_and_store
from .served import Phase
from .walk import WALK_CONFIG, Walk

CORES = ("rust", "python")
AHEAD = {"load_mode": "lookahead"}
TOKENS = prompt(200)


def ready(instance, served) -> bool:
    """One round; whether the request may be scheduled."""
    instance.round()
    audit(instance)
    return not instance.look_ahead.holds(served.req.rid)


def finish(instance, served) -> None:
    """Schedule a request as soon as it may be, and serve it to its end."""
    while served.phase is Phase.WAITING:
        eventually(lambda: instance.prefill(served))
    while served.phase is Phase.RUNNING:
        instance.decode(served)


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("kind", ["gqa", "mla"])
@pytest.mark.parametrize("page_size", [1, 16])
def test_a_waiting_requests_pages_are_on_the_device_before_it_is_scheduled(
    make, core, kind, page_size
) -> None:
    options = {"core": core, "kind": kind, "page_size": page_size}
    a, b = make(**options), make(**options, config=AHEAD)
    b.serve(prompt(70, seed=9))
    first = serve_and_store(a, TOKENS)
    served = b.submit(TOKENS)
    eventually(lambda: ready(b, served))
    whole = 199 // page_size * page_size
    assert counts(b)["load_pages"] == whole // page_size
    finish(b, served)
    assert served.tokens == first.tokens
    assert served.tiers == {"device": 0, "host": 0, "storage": whole}


def test_others_run_while_a_request_waits_for_its_pages(make) -> None:
    a, b = make(), make(config=AHEAD)
    serve_and_store(a, TOKENS)
    running = b.submit(prompt(30, seed=5), new_tokens=50)
    eventually(lambda: b.prefill(running))
    b.store.faults["get"].hold()
    waiting = b.submit(TOKENS)
    b.round()
    for _ in range(20):
        b.decode(running)
        assert not b.prefill(waiting)
        audit(b)
    b.store.faults["get"].release()
    eventually(lambda: ready(b, waiting))
    finish(b, waiting)
    assert waiting.tiers["storage"] == 192
    finish(b, running)


@pytest.mark.parametrize("core", CORES)
def test_a_read_that_is_late_is_left_and_its_slots_stay_withheld(make, core) -> None:
    a, b = make(core=core), make(core=core, config={**AHEAD, "load_timeout_ms": 40})
    serve_and_store(a, TOKENS)
    b.store.faults["get"].hold()
    served = b.submit(TOKENS)
    eventually(lambda: ready(b, served))
    assert counts(b)["loads_late"] == 1
    assert b.tree.protected_size() == 192
    finish(b, served)
    assert sum(served.tiers.values()) == 0, "it is recomputed"
    for seed in range(2, 7):
        b.serve(prompt(150, seed=seed))
        audit(b)
    assert b.controller.quarantined_tokens == 192
    b.store.faults["get"].release()
    drain(b)
    assert b.controller.quarantined_tokens == 0
    check_pool(b)


@pytest.mark.parametrize("fault", ["get", "exists"])
def test_a_request_goes_on_without_a_pool_that_fails(make, fault) -> None:
    a, b = make(), make(config=AHEAD)
    serve_and_store(a, TOKENS)
    b.store.faults[fault].fails_after_keys = 0
    served = b.serve(TOKENS)
    assert served.tiers["storage"] == 0
    audit(b)


def test_a_page_lost_between_question_and_read_is_recomputed(make) -> None:
    a, b = make(), make(config=AHEAD)
    first = serve_and_store(a, TOKENS)
    lost = a.keys(first, 192)[5]
    b.store.faults["get"].before = lambda keys: b.store.pool.drop(lost)
    served = b.serve(TOKENS)
    assert served.tiers["storage"] == 0
    assert served.tokens == first.tokens


def test_a_prefix_another_request_brings_meanwhile_is_not_kept_twice(make) -> None:
    a, b = make(), make(config=AHEAD)
    serve_and_store(a, TOKENS)
    one, other = b.submit(TOKENS), b.submit(TOKENS)
    eventually(lambda: ready(b, one) and ready(b, other))
    drain(b)
    assert len(b.tree.tree_core.all_values_flatten()) == 192
    finish(b, one)
    finish(b, other)


def test_what_another_request_computes_while_the_pool_is_asked_is_not_read(make) -> None:
    a, b = make(), make(config=AHEAD)
    other = b.submit(TOKENS[:112] + prompt(30, seed=4))
    eventually(lambda: ready(b, other))  # before the pool has anything
    first = serve_and_store(a, TOKENS)
    b.store.faults["exists"].hold()
    served = b.submit(TOKENS)
    b.round()
    finish(b, other)
    b.store.faults["exists"].release()
    finish(b, served)
    assert served.tokens == first.tokens
    assert served.tiers == {"device": 112, "host": 0, "storage": 80}
    check_at_rest(b)


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("least_tokens", [1, 32])
def test_what_an_earlier_match_found_missing_is_not_read_behind_a_longer_prefix(
    make, monkeypatch, core, least_tokens
) -> None:
    config = {**AHEAD, "min_load_tokens": least_tokens}
    a, b = make(core=core), make(core=core, config=config)
    serve_and_store(a, TOKENS)
    served = b.submit(TOKENS)
    monkeypatch.setattr(lookahead, "MOST_REQUESTS", 0)
    b.round()
    b.match(served)  # SGLang matches waiting requests by itself, while nothing is on the device
    # All whole pages come to the device, or all but the last, which is not worth a load.
    b.serve(TOKENS[: 200 if least_tokens == 1 else 176 + 8] + prompt(20, seed=6))
    monkeypatch.undo()
    eventually(lambda: ready(b, served))
    finish(b, served)
    assert served.tiers == {"device": 192 if least_tokens == 1 else 176, "host": 0, "storage": 0}
    drain(b)
    check_pool(b)
    check_at_rest(b)


def test_questions_that_are_late_open_the_breaker(make) -> None:
    b = make(config={**AHEAD, "load_timeout_ms": 30})
    b.store.faults["exists"].hold()
    waiting = [b.submit(prompt(200, seed=seed)) for seed in range(4)]
    eventually(lambda: (b.round(), not any(b.look_ahead.holds(s.req.rid) for s in waiting))[1])
    assert counts(b)["lookups_timed_out"] == 4
    assert b.controller.engine.in_trouble
    asked = b.store.counts["exists"].calls
    b.store.faults["exists"].release()
    for served in waiting:
        finish(b, served)
    assert b.store.counts["exists"].calls <= asked + 1, "those given up were not asked any more"


def test_a_read_that_was_given_up_is_no_sign_of_a_pool_that_delivers(make) -> None:
    a, b = make(), make(config={**AHEAD, "load_timeout_ms": 30}, tokens=8192)
    for seed in range(4):
        serve_and_store(a, prompt(200, seed=seed))
    b.store.faults["get"].hold()
    for seed in range(4):
        b.serve(prompt(200, seed=seed))
    assert b.controller.engine.loads_in_trouble
    b.store.faults["get"].release()
    drain(b)
    assert b.controller.quarantined_tokens == 0
    assert b.controller.engine.loads_in_trouble, "only a load in time closes it"
    assert counts(b)["loads"] == 0


def test_nothing_is_promised_while_loads_are_left_alone(make) -> None:
    a, b = make(), make(config=AHEAD)
    for seed in range(5):
        serve_and_store(a, prompt(200, seed=seed))
    b.store.faults["get"].fails_after_keys = 0
    for seed in range(4):
        b.serve(prompt(200, seed=seed))
    assert b.controller.engine.loads_in_trouble
    served = b.submit(prompt(200, seed=4))
    b.round()
    b.round()
    assert not b.look_ahead.holds(served.req.rid), "it does not wait for a load that is not tried"
    finish(b, served)


def test_an_aborted_request_leaves_nothing(make) -> None:
    a, b = make(), make(config=AHEAD)
    serve_and_store(a, TOKENS)
    b.store.faults["get"].hold()
    served = b.submit(TOKENS)
    eventually(lambda: (ready(b, served), b.look_ahead.held_tokens)[1])
    b.abort(served)
    audit(b)
    assert counts(b)["loads_late"] == 0, "the pool is not to blame"
    b.store.faults["get"].release()
    check_at_rest(b)


def test_reads_hold_no_more_than_their_share_of_the_pool(make) -> None:
    a, b = make(), make(config={**AHEAD, "lookahead_percent": 25}, tokens=1024)
    prompts = [prompt(200, seed=seed) for seed in range(4)]
    for tokens in prompts:
        serve_and_store(a, tokens)
    b.store.faults["get"].hold()
    waiting = [b.submit(tokens) for tokens in prompts]
    eventually(lambda: (b.round(), b.look_ahead.held_tokens)[1] > 0)
    for _ in range(20):
        b.round()
        assert 0 < b.look_ahead.held_tokens <= 256
    b.store.faults["get"].release()
    for served in waiting:
        finish(b, served)
        assert served.tiers["storage"] == 192, "the others had their turn"


def test_a_prefix_larger_than_the_share_is_recomputed(make) -> None:
    a, b = make(), make(config={**AHEAD, "lookahead_percent": 10}, tokens=1024)
    serve_and_store(a, TOKENS)
    assert b.serve(TOKENS).tiers["storage"] == 0


@pytest.mark.parametrize("core", CORES)
def test_a_prompt_computed_in_chunks_finds_the_slots_it_was_promised(make, core) -> None:
    a, b = make(core=core), make(core=core, config={**AHEAD, "lookahead_percent": 100}, tokens=512)
    serve_and_store(a, TOKENS)
    long = b.submit(prompt(400, seed=3), new_tokens=1)
    eventually(lambda: b.prefill(long, 48))
    waiting = b.submit(TOKENS)
    for _ in range(20):  # 464 slots are free and 352 of them are promised
        b.round()
        audit(b)
        assert b.look_ahead.held_tokens == 0
    while long.phase is Phase.CHUNKED:
        assert b.prefill(long, 48)
    finish(b, waiting)
    assert waiting.tiers["storage"] == 192


def test_a_flush_ends_what_is_under_way(make) -> None:
    a, b = make(), make(config=AHEAD)
    serve_and_store(a, TOKENS)
    served = b.submit(TOKENS)
    b.round()
    b.abort(served)
    b.flush()
    assert b.look_ahead.held_tokens == 0
    assert b.serve(TOKENS).tiers["storage"] == 192


def test_a_retracted_request_is_looked_ahead_for_again(make) -> None:
    b = make(config=AHEAD)
    served = b.submit(TOKENS, new_tokens=20)
    eventually(lambda: b.prefill(served))
    b.decode(served)
    drain(b)
    b.retract(served)
    b.tree.evict(EvictParams(num_tokens=b.allocator.size))
    finish(b, served)
    assert counts(b)["load_pages"] == 12


@pytest.mark.parametrize(("kind", "core"), [("gqa", "rust"), ("mla", "python")])
def test_a_random_walk_with_look_ahead_keeps_every_promise(make, kind, core) -> None:
    seed = f"ahead {kind} {core}"
    config = {**WALK_CONFIG, **AHEAD, "lookahead_percent": 60, "load_timeout_ms": 20}
    instances = [make(kind=kind, core=core, tokens=800, config=config) for _ in range(2)]
    walk = Walk(instances, random.Random(seed), random.Random(f"chaos {seed}"))
    for step in range(12_000):  # how often a read is late is the clock's, not the seed's
        done = sum(counts(i)["loads"] for i in instances) > 10
        late = sum(counts(i)["loads_late"] for i in instances) > 2
        if step >= 1_000 and done and late:
            break
        action = walk.step()
        try:
            for instance in instances:
                audit(instance)
        except BaseException:
            print(f"step {step} ({action}) of walk {seed!r}")
            raise
    walk.finish()
    for instance in instances:
        check_at_rest(instance)
    assert (done, late) == (True, True), "a walk in which nothing happened proves nothing"
