# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Pages that the pool has and does not deliver right: refused, recomputed, then left alone."""

from __future__ import annotations

import pytest

from ascend_direct.beliefs import SUSPECT_TTL_S
from ascend_direct.store.base import PageStatus

from .prompts import counts, evict_all, prompt, serve_and_store

TOKENS = prompt(200)
BAD_PAGE = 5


def _short(data: bytes) -> bytes:
    return data[:-1]


def _long(data: bytes) -> bytes:
    return data + b"\0"


def _empty(data: bytes) -> bytes:
    return b""


def _foreign(data: bytes) -> bytes:
    return b"another program's object"


def _replace(pool, key: str, change) -> None:
    data = pool.read(key)
    pool.drop(key)
    assert pool.write(key, change(data))


@pytest.mark.parametrize("change", [_short, _long, _empty, _foreign], ids=lambda f: f.__name__)
def test_an_object_of_another_size_is_refused_and_its_key_left_alone_for_a_while(
    make, shared, change
) -> None:
    a, b = make(), make(config={"write_policy": "off"})
    first = serve_and_store(a, TOKENS)
    _replace(shared, a.keys(first, 192)[BAD_PAGE], change)
    got = []
    for _ in range(3):
        served = serve_and_store(b, TOKENS)
        assert served.tokens == first.tokens
        got.append(served.tiers["storage"])
        evict_all(b)
    assert got == [0, BAD_PAGE * 16, BAD_PAGE * 16], "what is before the bad page is still good"
    assert counts(b)["loads_failed"] == 1
    clock = b.controller._suspects._clock
    b.controller._suspects._clock = lambda: clock() + SUSPECT_TTL_S
    assert serve_and_store(b, TOKENS).tiers["storage"] == 0
    assert counts(b)["loads_failed"] == 2, "tried again"
    shared.clear()  # what stays is compared with what was computed


def test_one_page_on_a_dead_member_does_not_close_the_pool_for_all_others(make) -> None:
    a, b = make(), make(config={"write_policy": "off"})
    first = serve_and_store(a, TOKENS)
    others = [prompt(100, seed=seed) for seed in range(1, 4)]
    for other in others:
        serve_and_store(a, other)
    b.store.faults["get"].statuses[a.keys(first, 192)[0]] = PageStatus.UNAVAILABLE
    for other in others * 2:
        serve_and_store(b, TOKENS)
        assert serve_and_store(b, other).tiers["storage"] == 96
        evict_all(b)
    assert counts(b)["breaker_opened"] == 0
    assert counts(b)["loads_failed"] == 1


def test_with_verification_a_page_with_wrong_bytes_is_recomputed_and_counted(make, shared) -> None:
    a, b = make(config={"verify": "all"}), make(config={"verify": "all"})
    first = serve_and_store(a, TOKENS)
    _replace(shared, a.keys(first, 192)[BAD_PAGE], lambda data: bytes([data[0] ^ 1]) + data[1:])
    served = serve_and_store(b, TOKENS)
    assert (served.tokens, served.tiers["storage"]) == (first.tokens, 0)
    assert counts(b)["loads_corrupt"] == counts(b)["loads_failed"] == 1
    evict_all(b)
    assert serve_and_store(b, TOKENS).tiers["storage"] == BAD_PAGE * 16
    shared.clear()


@pytest.mark.parametrize("mode", ["sample", "all"])
def test_with_verification_good_pages_are_loaded_and_shared_with_who_does_not_verify(
    make, shared, mode
) -> None:
    a, b, c = make(config={"verify": mode}), make(config={"verify": mode}), make()
    first = serve_and_store(a, TOKENS)
    for instance in (b, c):
        served = serve_and_store(instance, TOKENS)
        assert (served.tokens, served.tiers["storage"]) == (first.tokens, 192)
        assert counts(instance)["loads_corrupt"] == 0
    keys = shared.keys()
    shared.drop(*[key for key in keys if ":d" in key])
