# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""What one instance computed, another loads: which pages, which bytes, how it is reported."""

from __future__ import annotations

import pytest

from .audit import audit, drain
from .prompts import counts, evict_all, prompt, serve_and_store
from .served import Phase

KINDS = ("gqa", "gqa_narrow_v", "mla")
CORES = ("rust", "python")


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_what_one_instance_computed_another_loads(make, kind, core, page_size) -> None:
    a = make(kind=kind, core=core, page_size=page_size)
    b = make(kind=kind, core=core, page_size=page_size)
    # B's slots are others than A's, or a load into A's slot numbers would look right.
    b.serve(prompt(70, seed=9))
    tokens = prompt(200)
    first = serve_and_store(a, tokens)
    second = serve_and_store(b, tokens)
    assert second.tokens == first.tokens
    whole = 199 // page_size * page_size
    assert first.tiers == {"device": 0, "host": 0, "storage": 0}
    assert second.tiers == {"device": 0, "host": 0, "storage": whole}
    assert counts(b)["load_pages"] == whole // page_size


@pytest.mark.parametrize("core", CORES)
def test_answers_are_the_same_as_without_any_cache(make, core) -> None:
    a, b = make(core=core), make(core=core)
    alone = make(core=core, model="another-name", config={"write_policy": "off"})
    tokens = prompt(150)
    serve_and_store(a, tokens, new_tokens=8)
    loaded = b.serve(tokens, new_tokens=8)
    alone.model = a.model  # the same weights, but a namespace where nothing is stored
    assert loaded.tokens == alone.serve(tokens, new_tokens=8).tokens
    assert loaded.tiers["storage"] == 144


def test_a_shared_prefix_is_loaded_and_the_rest_computed(make) -> None:
    a, b = make(), make()
    common = prompt(128)
    serve_and_store(a, common + prompt(70, seed=1))
    served = serve_and_store(b, common + prompt(70, seed=2))
    assert served.tiers == {"device": 0, "host": 0, "storage": 128}


def test_device_pages_are_used_first_and_only_the_tail_is_loaded(make) -> None:
    a, b = make(), make()
    tokens = prompt(200)
    serve_and_store(a, tokens)
    serve_and_store(b, tokens[:96])
    served = serve_and_store(b, tokens)
    assert served.tiers == {"device": 96, "host": 0, "storage": 96}


def test_generated_tokens_are_stored_too(make) -> None:
    a, b = make(), make()
    first = serve_and_store(a, prompt(30), new_tokens=40)
    follow_up = first.tokens + prompt(20, seed=3)
    served = serve_and_store(b, follow_up)
    # The last sampled token was never fed back, so it has no KV.
    assert served.tiers["storage"] == 69 // 16 * 16


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_at_least_one_token_of_a_page_aligned_prompt_is_computed(make, core, page_size) -> None:
    a, b = make(page_size=page_size, core=core), make(page_size=page_size, core=core)
    tokens = prompt(128)
    serve_and_store(a, tokens)
    served = serve_and_store(b, tokens)
    assert served.tiers["storage"] == 128 - page_size


@pytest.mark.parametrize(("length", "storage"), [(96, 0), (112, 0), (113, 112), (200, 192)])
def test_a_hit_shorter_than_the_minimum_is_recomputed(make, length, storage) -> None:
    a, b = make(), make(config={"min_load_tokens": 100})
    tokens = prompt(200)
    serve_and_store(a, tokens)
    served = serve_and_store(b, tokens[:length])
    assert served.tiers["storage"] == storage


def test_the_minimum_counts_what_is_loaded_not_what_the_device_has(make) -> None:
    a, b = make(), make(config={"min_load_tokens": 100})
    tokens = prompt(200)
    serve_and_store(a, tokens)
    serve_and_store(b, tokens[:112])
    assert b.serve(tokens).tiers == {"device": 112, "host": 0, "storage": 0}


@pytest.mark.parametrize("core", CORES)
def test_chunked_prefill_loads_once_and_stores_every_chunk(make, core) -> None:
    a, b = make(core=core), make(core=core)
    tokens = prompt(200)
    first = serve_and_store(a, tokens, chunk=48)
    assert counts(a)["store_pages"] == 200 // 16
    evict_all(a)
    longer = tokens + prompt(150, seed=4)
    second = serve_and_store(b, longer, chunk=48)
    assert second.tiers == {"device": 0, "host": 0, "storage": 192}
    assert counts(b)["loads"] == 1
    assert first.tokens == a.serve(tokens).tokens


def test_a_hit_longer_than_the_chunk_is_loaded_whole(make) -> None:
    a, b = make(), make()
    tokens = prompt(300)
    serve_and_store(a, tokens)
    served = b.submit(tokens)
    assert b.prefill(served, chunk=32)
    assert served.tiers["storage"] == 288
    assert served.phase is Phase.RUNNING
    audit(b)
    b.abort(served)


def test_a_retracted_request_loads_what_it_had_stored(make) -> None:
    a = make()
    tokens = prompt(200)
    served = a.submit(tokens, new_tokens=20)
    a.prefill(served)
    for _ in range(10):
        a.decode(served)
    a.retract(served)
    audit(a)
    evict_all(a)
    a.prefill(served)
    audit(a)
    assert counts(a)["load_pages"] == 12
    assert served.req.host_hit_is_storage
    a.abort(served)


def test_a_load_evicts_the_device_cache_where_it_needs_room(make) -> None:
    a, b = make(), make(tokens=512)
    tokens = prompt(300)
    serve_and_store(a, tokens)
    serve_and_store(b, prompt(400, seed=5))
    served = serve_and_store(b, tokens)
    assert served.tiers["storage"] == 288


def test_pages_that_were_loaded_are_not_stored_again(make) -> None:
    a, b = make(), make()
    tokens = prompt(200)
    serve_and_store(a, tokens)
    serve_and_store(b, tokens + prompt(60, seed=6))
    assert b.store.counts["put"].keys == 260 // 16 - 192 // 16
    assert counts(b)["store_failed_pages"] == 0


@pytest.mark.parametrize(
    "apart", [{"lora": "adapter"}, {"salt": "tenant"}, {"extra_key": "media"}], ids=str
)
@pytest.mark.parametrize("core", CORES)
def test_adapters_salts_and_extra_keys_do_not_share_pages(make, core, apart) -> None:
    a, b = make(core=core), make(core=core)
    tokens = prompt(200)
    serve_and_store(a, tokens)
    assert serve_and_store(b, tokens, **apart).tiers["storage"] == 0
    evict_all(b)
    assert serve_and_store(b, tokens, **apart).tiers["storage"] == 192
    evict_all(a)
    assert serve_and_store(a, tokens, **apart).tiers["storage"] == 192
    other = {name: f"{value}2" for name, value in apart.items()}
    assert serve_and_store(a, tokens, **other).tiers["storage"] == 0


def test_two_models_in_one_pool_never_share_a_page(make, shared) -> None:
    a, b = make(model="one"), make(model="two")
    tokens = prompt(200)
    serve_and_store(a, tokens)
    stored = len(shared)
    assert serve_and_store(b, tokens).tiers["storage"] == 0
    assert len(shared) == 2 * stored
    evict_all(b)
    assert serve_and_store(b, tokens).tiers["storage"] == 192


def test_pools_of_other_shapes_never_share_a_page(make) -> None:
    tokens = prompt(200)
    for options in (
        {"kind": "gqa"},
        {"kind": "gqa_narrow_v"},
        {"kind": "mla"},
        {"kind": "gqa", "page_size": 64},
    ):
        instance = make(**options)
        assert serve_and_store(instance, tokens).tiers["storage"] == 0
        evict_all(instance)
        whole = 199 // instance.page_size * instance.page_size
        assert serve_and_store(instance, tokens).tiers["storage"] == whole


@pytest.mark.parametrize("core", CORES)
def test_write_through_selective_stores_what_is_used_again(make, core) -> None:
    a = make(core=core, config={"write_policy": "write_through_selective", "selective_hits": 2})
    serve_and_store(a, prompt(200))
    assert len(a.store.pool) == 0
    serve_and_store(a, prompt(200))
    assert len(a.store.pool) == 200 // 16
    serve_and_store(a, prompt(200, seed=7))
    assert len(a.store.pool) == 200 // 16


@pytest.mark.parametrize("core", CORES)
def test_write_policy_off_stores_nothing_and_still_loads(make, core) -> None:
    a, b = make(core=core), make(core=core, config={"write_policy": "off"})
    serve_and_store(b, prompt(100, seed=8))
    assert b.store.counts["put"].calls == 0
    serve_and_store(a, prompt(200))
    assert serve_and_store(b, prompt(200)).tiers["storage"] == 192


def test_two_requests_in_flight_share_what_the_first_loaded(make) -> None:
    a, b = make(), make()
    tokens = prompt(200)
    serve_and_store(a, tokens)
    first, second = b.submit(tokens, new_tokens=4), b.submit(tokens, new_tokens=4)
    b.prefill(first)
    b.prefill(second)
    audit(b)
    assert first.tiers["storage"] == 192
    assert second.tiers == {"device": 192, "host": 0, "storage": 0}
    for served in (first, second):
        while served.phase is Phase.RUNNING:
            b.decode(served)
            audit(b)
    drain(b)
