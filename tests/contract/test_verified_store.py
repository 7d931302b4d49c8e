# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""A verified store keeps the contract, finds wrong bytes, and shares a pool with servers that do
not verify."""

from __future__ import annotations

import ctypes
import logging

import numpy as np
import pytest

from ascend_direct.errors import ConfigError, StoreError, StoreUnavailable
from ascend_direct.page_key import Namespace, PageKeys
from ascend_direct.store.base import MAX_KEY_BYTES, Memory, PageStatus, PageStore, StoreContext
from ascend_direct.store.local import create
from ascend_direct.store.verified import SAMPLE_ONE_IN, SUFFIX_BYTES, VerifiedStore
from tests.contract.store_contract import Arena, StoreContract, StoreFactory, new_keys
from tests.fakes.memory_store import MemoryPool, MemoryStore

OK, MISSING, MISMATCH = PageStatus.OK, PageStatus.MISSING, PageStatus.MISMATCH
FAILED, FULL, UNAVAILABLE = PageStatus.FAILED, PageStatus.FULL, PageStatus.UNAVAILABLE
LENGTHS = (96, 64)


class Server:
    """One server on a shared pool: its memory, its store, how often it found corruption."""

    def __init__(self, pool: MemoryPool, mode: str) -> None:
        self.corrupt = 0
        self.arena = Arena()
        self.inner = MemoryStore(pool)
        self.store: PageStore = self.inner
        if mode != "off":
            self.store = VerifiedStore(self.inner, mode, self._count)  # type: ignore[arg-type]
        self.store.open(StoreContext())

    def _count(self) -> None:
        self.corrupt += 1

    def put(self, keys: list[str], seed: int = 1) -> list[PageStatus]:
        rng = np.random.default_rng(seed)
        pages = self.arena.place(len(keys), LENGTHS, rng)
        self.arena.scramble(rng)
        return self.store.put(keys, pages)

    def get(self, keys: list[str]) -> list[PageStatus]:
        return self.store.get(keys, self.arena.place(len(keys), LENGTHS, np.random.default_rng(3)))


@pytest.fixture
def pool() -> MemoryPool:
    return MemoryPool()


def flip_a_bit(pool: MemoryPool, key: str) -> None:
    """As a member with broken memory would."""
    data = bytearray(pool.read(key) or b"")
    data[len(data) // 2] ^= 0x10
    pool.drop(key)
    assert pool.write(key, bytes(data))


def digests_of(pool: MemoryPool, key: str) -> list[str]:
    names = pool.keys()
    return [name for name in names if name.startswith(f"{key}:d")]


class VerifiedContract(StoreContract):
    mode: str

    @pytest.fixture
    def store_factory(self, pool: MemoryPool) -> StoreFactory:
        def make(context: StoreContext) -> PageStore:
            store = VerifiedStore(MemoryStore(pool), self.mode, lambda: None)  # type: ignore[arg-type]
            store.open(context)
            return store

        return make

    def test_the_longest_key_works_and_its_last_byte_counts(  # type: ignore[override]
        self, store: PageStore, arena: Arena, rng: np.random.Generator
    ) -> None:
        """A page's key leaves room for what a digest adds, however long its hash."""
        longest = PageKeys(Namespace({}).digest16, "r99999of99999").key("f" * 200)
        assert len(longest) + SUFFIX_BYTES <= MAX_KEY_BYTES
        pages = arena.place(2, self._lengths(), rng)
        assert store.put([longest, longest[:-1] + "e"], pages) == [OK, OK]
        assert store.exists([longest, longest[:-1] + "d"]) == [OK, MISSING]
        assert store.get([longest, longest[:-1] + "e"], pages) == [OK, OK]


class TestAll(VerifiedContract):
    mode = "all"


class TestSample(VerifiedContract):
    mode = "sample"


# --- wrong bytes


def test_a_page_whose_bytes_changed_in_the_pool_is_a_mismatch_and_its_neighbours_are_not(
    pool: MemoryPool, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = Server(pool, "all"), Server(pool, "all")
    keys = new_keys(3)
    assert a.put(keys) == [OK] * 3
    flip_a_bit(pool, keys[1])
    with caplog.at_level(logging.ERROR):
        assert b.get(keys) == [OK, MISMATCH, OK]
        assert b.get(keys) == [OK, MISMATCH, OK]
    assert b.corrupt == 2
    assert [record.message for record in caplog.records if keys[1] in record.message] != []
    assert len(caplog.records) == 1, "one line per interval"


def test_a_page_under_another_pages_key_is_a_mismatch(pool: MemoryPool) -> None:
    a = Server(pool, "all")
    one, other = new_keys(2)
    assert a.put([one, other]) == [OK, OK]
    page = pool.read(one)
    pool.drop(other)
    assert page is not None
    pool.write(other, page)
    assert a.get([one, other]) == [OK, MISMATCH]


def test_a_store_that_reports_bytes_it_did_not_deliver_is_found_out(pool: MemoryPool) -> None:
    a, b = Server(pool, "all"), Server(pool, "all")
    keys = new_keys(2)
    a.put(keys)
    whole = b.inner.get

    def spoil(asked, pages):
        answers = whole(asked, pages)
        ctypes.memset(int(pages.addresses[0, 1]), 0, 8)
        return answers

    b.inner.get = spoil  # type: ignore[method-assign]
    assert b.get(keys) == [MISMATCH, OK]


def test_two_servers_that_store_one_page_at_once_do_not_accuse_each_other(pool: MemoryPool) -> None:
    """KV that two servers compute is not the same to the last bit, and the first write wins."""
    a, b = Server(pool, "all"), Server(pool, "all")
    keys = new_keys(2)

    def store_meanwhile(asked) -> None:
        b.inner.faults["put"].before = None
        assert a.put(keys, seed=1) == [OK, OK]

    b.inner.faults["put"].before = store_meanwhile  # after it saw that nobody has them
    assert b.put(keys, seed=2) == [OK, OK]
    for server in (a, b):
        assert server.get(keys) == [OK, OK]
        assert server.corrupt == 0


# --- servers of every mode share a pool


def test_pages_stored_with_digests_are_read_by_servers_without(pool: MemoryPool) -> None:
    keys = new_keys(40)
    assert Server(pool, "all").put(keys) == [OK] * 40
    for mode in ("off", "sample"):
        server = Server(pool, mode)
        assert server.store.exists(keys) == [OK] * 40
        assert server.get(keys) == [OK] * 40


def test_pages_without_digests_are_no_pages_to_who_verifies_all(pool: MemoryPool) -> None:
    off, verifying = Server(pool, "off"), Server(pool, "all")
    keys = new_keys(2)
    off.put(keys)
    assert verifying.store.exists(keys) == [MISSING] * 2
    assert verifying.get(keys) == [MISSING] * 2
    assert verifying.put(keys, seed=2) == [FAILED] * 2, "not stored in a way it could use"
    assert off.get(keys) == [OK] * 2
    assert verifying.corrupt == 0


def test_a_sample_is_one_page_in_sixteen_the_same_for_all(pool: MemoryPool) -> None:
    a, b = Server(pool, "sample"), Server(pool, "sample")
    keys = new_keys(640)
    assert a.put(keys) == [OK] * 640
    objects = len(pool) - 640
    assert 640 / SAMPLE_ONE_IN / 2 < objects / 2 < 640 / SAMPLE_ONE_IN * 2
    for key in keys:
        flip_a_bit(pool, key)
    found = b.get(keys).count(MISMATCH)
    assert found == objects / 2


# --- a pool that fails


def test_a_page_whose_digest_is_gone_is_not_used(pool: MemoryPool) -> None:
    a = Server(pool, "all")
    (key,) = new_keys(1)
    a.put([key])
    pool.drop(*digests_of(pool, key))
    assert a.get([key]) == [MISSING]
    assert a.corrupt == 0


def test_while_digests_cannot_be_asked_for_no_page_is_good(pool: MemoryPool) -> None:
    a = Server(pool, "all")
    keys = new_keys(2)
    a.put(keys)
    a.inner.faults["exists"].statuses = dict.fromkeys(digests_of(pool, keys[0]), UNAVAILABLE)
    assert a.get(keys) == [UNAVAILABLE, OK]
    a.inner.faults["exists"].fails_after_keys = 0
    with pytest.raises(StoreUnavailable):
        a.get(keys)


def test_a_page_whose_digest_has_no_room_is_not_stored(pool: MemoryPool) -> None:
    a = Server(pool, "all")
    keys = new_keys(2)
    a.inner.faults["put"].statuses[f"{keys[0]}:d"] = FULL
    assert a.put(keys) == [FULL, OK]
    assert keys[0] not in pool
    assert a.get(keys) == [MISSING, OK]


def test_a_real_store_is_verified_too(tmp_path) -> None:
    store = VerifiedStore(create({"path": str(tmp_path / "p"), "size_bytes": 1 << 24}), "all", list)
    store.open(StoreContext())
    arena, rng = Arena(), np.random.default_rng(5)
    pages, keys = arena.place(4, LENGTHS, rng), new_keys(4)
    arena.scramble(rng)
    assert store.put(keys, pages) == [OK] * 4
    assert store.exists(keys) == [OK] * 4
    assert store.get(keys, pages) == [OK] * 4
    store.close()


@pytest.mark.parametrize("operation", ["exists", "get", "put"])
def test_a_store_that_does_not_answer_for_every_key_has_failed_as_a_whole(
    pool: MemoryPool, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    server = Server(pool, "all")
    keys = new_keys(3)
    server.put(keys)
    whole = getattr(server.inner, operation)
    monkeypatch.setattr(server.inner, operation, lambda *arguments: whole(*arguments)[:-1])
    calls = {"exists": server.store.exists, "get": server.get, "put": server.put}
    with pytest.raises(StoreError, match=r"\d answers for \d keys"):
        calls[operation](new_keys(3) if operation == "put" else keys)


def test_device_memory_without_the_ascend_runtime_is_refused(
    pool: MemoryPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ascend_direct.store.device_copy._LIBRARY", "libno_such_runtime.so")
    store = VerifiedStore(MemoryStore(pool), "all", list)
    with pytest.raises(ConfigError, match="verify cannot read"):
        store.open(StoreContext(memory=Memory.DEVICE))
