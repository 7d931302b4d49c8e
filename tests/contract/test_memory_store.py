# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""The tests' own store keeps the contract, and its faults are what they say."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from ascend_direct.errors import StoreUnavailable
from ascend_direct.store.base import PageStatus, StoreContext
from tests.contract.store_contract import Arena, StoreContract, StoreFactory
from tests.fakes.memory_store import MemoryPool, MemoryStore

OK, MISSING, FULL = PageStatus.OK, PageStatus.MISSING, PageStatus.FULL


class TestMemoryStore(StoreContract):
    @pytest.fixture
    def store_factory(self) -> StoreFactory:
        pool = MemoryPool()

        def make(context: StoreContext) -> MemoryStore:
            store = MemoryStore(pool)
            store.open(context)
            return store

        return make


@pytest.fixture
def store() -> MemoryStore:
    store = MemoryStore()
    store.open(StoreContext())
    return store


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def test_two_instances_share_a_pool(rng: np.random.Generator) -> None:
    arena, pool = Arena(), MemoryPool()
    one, other = MemoryStore(pool), MemoryStore(pool)
    one.open(StoreContext())
    other.open(StoreContext())
    assert one.put(["k"], arena.place(1, (8,), rng)) == [OK]
    assert other.exists(["k"]) == [OK]
    one.close()
    assert other.get(["k"], arena.place(1, (8,), rng)) == [OK]


def test_a_held_call_waits_until_it_is_released(store: MemoryStore) -> None:
    answers: list[PageStatus] = []
    store.faults["exists"].hold()
    caller = threading.Thread(target=lambda: answers.extend(store.exists(["k"])))
    caller.start()
    assert store.faults["exists"].entered.wait(10)
    assert answers == []
    store.faults["exists"].release()
    caller.join(10)
    assert answers == [MISSING]


def test_a_page_can_vanish_between_lookup_and_get(
    store: MemoryStore, rng: np.random.Generator
) -> None:
    pages = Arena().place(2, (8,), rng)
    store.put(["a", "b"], pages)
    assert store.exists(["a", "b"]) == [OK, OK]
    store.faults["get"].before = lambda keys: store.pool.drop(keys[0])
    assert store.get(["a", "b"], pages) == [MISSING, OK]


def test_a_call_can_fail_after_some_keys(store: MemoryStore, rng: np.random.Generator) -> None:
    pages = Arena().place(2, (8,), rng)
    store.faults["put"].fails_after_keys = 1
    with pytest.raises(StoreUnavailable, match="after 1 keys"):
        store.put(["a", "b"], pages)
    assert store.pool.keys() == ["a"]


def test_an_injected_failure_of_get_leaves_a_half_written_page(
    store: MemoryStore, rng: np.random.Generator
) -> None:
    arena = Arena()
    pages = arena.place(2, (8, 8), rng)
    store.put(["a", "b"], pages)
    store.faults["get"].statuses["a"] = PageStatus.UNAVAILABLE
    assert store.get(["a", "b"], pages) == [PageStatus.UNAVAILABLE, OK]
    assert arena.read(pages, 0) == b"\xa5" * 8 + bytes(8)
    assert arena.read(pages, 1) == bytes(16)


def test_a_delay_is_slept(store: MemoryStore) -> None:
    store.faults["exists"].delay_ms = 30
    start = time.monotonic()
    store.exists(["k"])
    assert time.monotonic() - start >= 0.03


@pytest.mark.parametrize(
    ("evicts", "answers", "left"),
    [(True, [OK, OK, OK], ["b", "c"]), (False, [OK, OK, FULL], ["a", "b"])],
)
def test_a_full_pool_evicts_the_oldest_or_says_full(
    evicts: bool, answers: list[PageStatus], left: list[str], rng: np.random.Generator
) -> None:
    store = MemoryStore(MemoryPool(capacity_bytes=20, evicts=evicts))
    store.open(StoreContext())
    assert store.put(["a", "b", "c"], Arena().place(3, (8,), rng)) == answers
    assert store.pool.keys() == left


def test_calls_keys_and_bytes_are_counted(store: MemoryStore, rng: np.random.Generator) -> None:
    pages = Arena().place(2, (8, 4), rng)
    store.put(["a", "b"], pages)
    store.get(["a", "x"], pages)
    assert (store.counts["put"].calls, store.counts["put"].keys) == (1, 2)
    assert (store.counts["get"].ok_pages, store.counts["get"].ok_bytes) == (1, 12)
