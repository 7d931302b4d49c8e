# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""A store that starts without its pool: the contract once it is there, and what happens before."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from ascend_direct.errors import ConfigError, StoreUnavailable
from ascend_direct.store.attach import AttachingStore
from ascend_direct.store.base import PageStatus, StoreContext
from tests.contract.store_contract import Arena, StoreContract, StoreFactory, new_keys
from tests.fakes.memory_store import MemoryPool, MemoryStore
from tests.waiting import eventually

OK = PageStatus.OK


class Pool(MemoryStore):
    """A store whose pool may be away when it is opened.

    Attributes:
        away: what `open` raises, until None.
        gate: `open` waits for it, as the native client does for minutes.
    """

    def __init__(self, away: Exception | None = None) -> None:
        super().__init__()
        self.away = away
        self.gate = threading.Event()
        self.gate.set()
        self.opens = 0

    def open(self, context: StoreContext) -> None:
        self.opens += 1
        assert self.gate.wait(30)
        if self.away is not None:
            raise self.away
        super().open(context)


AWAY = StoreUnavailable("connect", "nobody listens at tcp://127.0.0.1:1")
Make = Callable[..., AttachingStore]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[tuple[AttachingStore, Pool]] = []

    def build(pool: Pool, first_wait_s: float = 5.0) -> AttachingStore:
        store = AttachingStore(pool, first_wait_s=first_wait_s, first_pause_s=0.01)
        made.append((store, pool))
        return store

    yield build
    for store, pool in made:
        pool.gate.set()
        store.close()


class TestAttached(StoreContract):
    @pytest.fixture
    def store_factory(self) -> StoreFactory:
        pool = MemoryPool()

        def make(context: StoreContext) -> AttachingStore:
            store = AttachingStore(MemoryStore(pool))
            store.open(context)
            return store

        return make


def test_a_pool_that_is_there_is_used_at_once(make: Make) -> None:
    store = make(Pool())
    store.open(StoreContext())
    assert store.attached


def test_a_pool_that_is_away_does_not_hold_up_the_start_and_is_attached_when_it_appears(
    make: Make,
) -> None:
    pool = Pool(AWAY)
    store = make(pool)
    store.open(StoreContext())
    keys, arena = new_keys(2), Arena()
    pages = arena.place(2, (64,), np.random.default_rng(1))
    assert not store.attached
    for call in (
        lambda: store.exists(keys),
        lambda: store.put(keys, pages),
        lambda: store.get(keys, pages),
    ):
        with pytest.raises(StoreUnavailable, match="has not been reached"):
            call()
    assert store.stats().pages is None
    eventually(lambda: pool.opens > 3)
    pool.away = None
    eventually(lambda: store.attached)
    assert store.put(keys, pages) == [OK, OK]
    assert store.get(keys, pages) == [OK, OK]


def test_a_client_that_hangs_while_it_joins_does_not_hold_up_the_start(make: Make) -> None:
    pool = Pool()
    pool.gate.clear()
    store = make(pool, first_wait_s=0.05)
    store.open(StoreContext())
    with pytest.raises(StoreUnavailable):
        store.exists(new_keys(1))
    pool.gate.set()
    eventually(lambda: store.attached)
    assert pool.opens == 1, "one attempt at a time"


def test_a_configuration_that_cannot_work_ends_the_start(make: Make) -> None:
    store = make(Pool(ConfigError(["no NPU here."])))
    with pytest.raises(ConfigError, match="no NPU"):
        store.open(StoreContext())


def test_a_pool_that_appears_with_other_settings_is_tried_until_they_fit(make: Make) -> None:
    pool = Pool(AWAY)
    store = make(pool)
    store.open(StoreContext())
    pool.away = ConfigError(["memcache.world_size is 256 but 8 in the pool: use the pool's."])
    tried = pool.opens
    eventually(lambda: pool.opens > tried + 1)
    pool.away = None
    eventually(lambda: store.attached)


def test_a_store_that_breaks_its_contract_is_tried_again(make: Make) -> None:
    pool = Pool(RuntimeError("a provider with a bug"))
    store = make(pool)
    store.open(StoreContext())
    pool.away = None
    eventually(lambda: store.attached)


def test_closing_while_the_pool_is_away_ends_the_thread(make: Make) -> None:
    store = make(Pool(AWAY))
    store.open(StoreContext())
    store.close()
    eventually(lambda: not [t for t in threading.enumerate() if t.name == "ad-attach"])


def test_a_pool_that_lets_us_in_after_we_have_closed_is_left_again(make: Make) -> None:
    pool = Pool()
    pool.gate.clear()
    store = make(pool, first_wait_s=0.01)
    store.open(StoreContext())
    store.close()
    pool.gate.set()
    eventually(lambda: pool.closes == 1)
    assert not store.attached
