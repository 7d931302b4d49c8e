# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""What a match costs, and what is remembered of it: memo, beliefs, hit markers, timeouts."""

from __future__ import annotations

import time

import pytest
from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer

from tests.waiting import eventually

from .audit import audit, drain
from .prompts import counts, evict_all, prompt, serve_and_store
from .served import Phase

CORES = ("rust", "python")
TOKENS = prompt(200)


def _finish(instance, served) -> None:
    while served.phase is not Phase.DONE:
        instance.decode(served) if served.phase is Phase.RUNNING else instance.prefill(served)


def test_a_waiting_request_asks_the_pool_once(make) -> None:
    a, b = make(), make(config={"lookup_memo_ms": 60_000, "belief_pages": 0})
    serve_and_store(a, TOKENS)
    served = b.submit(TOKENS)
    for _ in range(5):
        b.match(served)
        assert served.req.host_hit_length == 192
    assert b.store.counts["exists"].calls == 1
    assert counts(b)["lookups_from_memo"] == 4
    _finish(b, served)


def test_a_single_rank_names_the_longest_prefix_only(make) -> None:
    a, b = make(), make(config={"min_load_tokens": 64})
    serve_and_store(a, TOKENS)
    hashes = b.submit(TOKENS).hashes(192, 16)
    for pages, named in ((12, [12]), (4, [4]), (3, [])):  # 3 pages are not worth a load
        asked = [PoolTransfer(name=PoolName.KV, keys=hashes[:pages])]
        assert b.controller.lookup(f"{pages} pages", asked) == named
    b.abort(b.requests[0])


def test_a_memo_expires(make) -> None:
    a, b = make(), make(config={"lookup_memo_ms": 20, "belief_pages": 0})
    served = b.submit(TOKENS)
    b.match(served)
    assert served.req.host_hit_length == 0
    serve_and_store(a, TOKENS)
    time.sleep(0.03)
    b.match(served)
    assert served.req.host_hit_length == 192
    _finish(b, served)


def test_a_memo_answers_its_own_request_only(make) -> None:
    a, b = make(), make(config={"lookup_memo_ms": 60_000, "belief_pages": 0})
    serve_and_store(a, TOKENS)
    served = b.submit(TOKENS, rid="again")
    b.match(served)
    b.abort(served)
    # Same name, same first page, same length; the rest differs.
    other = b.submit(TOKENS[:16] + prompt(184, seed=1), rid="again")
    b.match(other)
    assert other.req.host_hit_length == 16
    _finish(b, other)


@pytest.mark.parametrize("core", CORES)
def test_what_is_believed_stored_costs_no_question(make, core) -> None:
    a, b = make(core=core), make(core=core)
    serve_and_store(a, TOKENS)
    serve_and_store(b, TOKENS)
    asked = b.store.counts["exists"].calls
    evict_all(b)
    assert serve_and_store(b, TOKENS).tiers["storage"] == 192
    assert b.store.counts["exists"].calls == asked


def test_what_this_instance_stored_it_believes(make) -> None:
    a = make()
    serve_and_store(a, TOKENS)
    asked = a.store.counts["exists"].calls
    evict_all(a)
    assert serve_and_store(a, TOKENS).tiers["storage"] == 192
    assert a.store.counts["exists"].calls == asked


@pytest.mark.parametrize("core", CORES)
def test_a_wrong_belief_costs_one_refused_load_and_heals(make, shared, core) -> None:
    a = make(core=core)
    serve_and_store(a, TOKENS)
    evict_all(a)
    shared.clear()  # the pool was restarted
    assert serve_and_store(a, TOKENS).tiers["storage"] == 0
    assert counts(a)["loads_failed"] == 1
    assert len(shared) == 12, "what was lost is stored again"
    evict_all(a)
    assert serve_and_store(a, TOKENS).tiers["storage"] == 192


def test_a_belief_ages(make, shared) -> None:
    a = make(config={"belief_ttl_ms": 20})
    serve_and_store(a, TOKENS)
    evict_all(a)
    shared.clear()
    time.sleep(0.03)
    assert serve_and_store(a, TOKENS).tiers["storage"] == 0
    assert counts(a)["loads_failed"] == 0, "the pool was asked again"


def test_pages_lost_in_the_middle_shorten_the_hit(make, shared) -> None:
    a, b = make(), make()
    served = serve_and_store(a, TOKENS)
    shared.drop(a.keys(served, 192)[7])
    assert serve_and_store(b, TOKENS).tiers["storage"] == 7 * 16


def test_a_lookup_that_times_out_is_a_miss(make) -> None:
    a, b = make(), make(config={"lookup_timeout_ms": 30})
    serve_and_store(a, TOKENS)
    b.store.faults["exists"].hold()
    served = b.submit(TOKENS)
    begin = time.monotonic()
    assert b.prefill(served)
    assert time.monotonic() - begin < 1.0
    assert served.tiers["storage"] == 0
    assert counts(b)["lookups_timed_out"] == 1
    b.store.faults["exists"].release()
    _finish(b, served)


def test_while_the_pool_is_down_requests_do_not_wait_for_it(make) -> None:
    a, b = make(), make(config={"lookup_timeout_ms": 50, "store_timeout_ms": 50})
    serve_and_store(a, TOKENS)
    b.store.faults["exists"].fails_after_keys = 0
    for seed in range(8):
        assert serve_and_store(b, prompt(100, seed=seed)).tiers["storage"] == 0
    assert counts(b)["breaker_opened"] == 1
    assert b.store.counts["exists"].calls <= 6, "lookups and stores, probes included"
    audit(b)


def test_while_the_pool_is_down_what_is_believed_stored_is_not_promised(make) -> None:
    a = make()
    serve_and_store(a, TOKENS)
    a.store.faults["exists"].fails_after_keys = 0
    a.store.faults["get"].fails_after_keys = 0
    for seed in range(8):
        serve_and_store(a, prompt(100, seed=seed))
    evict_all(a)
    refused = counts(a)["loads_failed"]
    assert a.serve(TOKENS).tiers["storage"] == 0
    assert counts(a)["loads_failed"] == refused, "device slots were taken for a load in vain"


def test_after_the_pool_has_come_back_it_is_used_again(make) -> None:
    a, b = make(), make(config={"write_policy": "off"})
    serve_and_store(a, TOKENS)
    b.store.faults["exists"].fails_after_keys = 0
    for seed in range(4):
        b.serve(prompt(60, seed=seed))
    assert counts(b)["breaker_opened"] == 1
    b.store.faults["exists"].fails_after_keys = None

    def hit() -> bool:
        evict_all(b)
        return b.serve(TOKENS).tiers["storage"] == 192

    eventually(hit)


@pytest.mark.parametrize("core", CORES)
def test_hit_markers_of_requests_that_never_loaded_do_not_pile_up(make, core) -> None:
    a, b = make(core=core), make(core=core)
    serve_and_store(a, TOKENS)
    first, second = b.submit(TOKENS), b.submit(TOKENS)
    b.match(second)  # waits in the queue with a pool hit
    assert b.tree.linker.has_hit(second.req.rid)
    _finish(b, first)
    _finish(b, second)  # by now the device has all of it
    assert second.tiers == {"device": 192, "host": 0, "storage": 0}
    assert b.tree.linker.hit_markers == {}
    assert len(b.controller._memo) == 0


def test_memos_and_markers_go_with_an_aborted_request(make) -> None:
    a, b = make(), make()
    serve_and_store(a, TOKENS)
    served = b.submit(TOKENS)
    b.match(served)
    b.abort(served)
    assert b.tree.linker.hit_markers == {}
    assert len(b.controller._memo) == 0
    drain(b)


def test_a_detached_instance_neither_loads_nor_stores(make) -> None:
    a, b = make(), make()
    serve_and_store(a, TOKENS)
    waiting = b.submit(TOKENS)
    b.match(waiting)
    b.controller.detach("the weights changed")
    served = serve_and_store(b, prompt(200, seed=1))
    assert served.tiers["storage"] == 0
    _finish(b, waiting)  # matched before, loaded after
    assert waiting.tiers["storage"] == 0
    assert b.store.counts["put"].calls == 0


def test_slow_answers_hold_up_a_round_for_so_long_only(make) -> None:
    a, b = make(), make(config={"lookup_timeout_ms": 200})
    prompts = [prompt(200, seed=seed) for seed in range(6)]
    for tokens in prompts:
        serve_and_store(a, tokens)
    b.store.faults["exists"].delay_ms = 120  # in time, each of them
    waiting = [b.submit(tokens) for tokens in prompts]
    for asked in (range(2, 5), range(4, 7)):
        b.round()
        for served in waiting:
            b.match(served)
        assert b.store.counts["exists"].calls in asked
    assert counts(b)["lookups_put_off"] >= 2
    b.store.faults["exists"].delay_ms = 0
    for served in waiting:
        b.abort(served)
    assert b.serve(prompts[5]).tiers["storage"] == 192


def test_a_turn_that_a_streaming_session_keeps_leaves_nothing_of_its_hit(make, monkeypatch) -> None:
    a, b = make(), make()
    serve_and_store(a, TOKENS)
    served = b.submit(TOKENS)
    b.match(served)
    assert b.tree.linker.hit_markers
    monkeypatch.setattr(b.tree.session, "try_cache_finished_req", lambda req: True)
    assert b.tree.claim_kv_row(served.req)
    assert b.tree.linker.hit_markers == {}
    monkeypatch.undo()
    assert not b.tree.claim_kv_row(served.req)
    b.abort(served)
