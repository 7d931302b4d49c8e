# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""A store whose pages are packed keeps the contract, shares pools with those that scatter, and
`auto` takes what this pool is faster with."""

from __future__ import annotations

import gc
import logging
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from ascend_direct.device import Device
from ascend_direct.errors import ConfigError, StoreError, StoreUnavailable
from ascend_direct.page_layout import Region
from ascend_direct.store import packed, page_packer
from ascend_direct.store.base import Memory, PageBatch, PageStatus, PageStore, StoreContext
from ascend_direct.store.local import create
from ascend_direct.store.packed import MakeBlock, PackedStore, with_transfer
from ascend_direct.store.page_packer import HostBlock
from tests.contract.store_contract import Arena, StoreContract, StoreFactory, new_keys
from tests.fakes.memory_store import MemoryPool, MemoryStore

OK, MISSING, MISMATCH = PageStatus.OK, PageStatus.MISSING, PageStatus.MISMATCH
FAILED, UNAVAILABLE = PageStatus.FAILED, PageStatus.UNAVAILABLE
LENGTHS = (96, 64, 7)
DEVICE = StoreContext(Memory.DEVICE)  # as the driver emulation poses: the memory is the host's


class SpanStore(MemoryStore):
    """A pool that takes its time for every span and every byte; knows the most spans of a page."""

    def __init__(self, pool: MemoryPool, span_ms: float, byte_ms: float) -> None:
        super().__init__(pool)
        self.cost_ms = (span_ms, byte_ms)
        self.spans: list[int] = []

    def get(self, keys: Sequence[str], pages: PageBatch) -> list[PageStatus]:
        span_ms, byte_ms = self.cost_ms
        self.spans.append(len(pages.lengths_bytes))
        time.sleep((span_ms * pages.addresses.size + byte_ms * pages.page_bytes * len(pages)) / 1e3)
        return super().get(keys, pages)

    def put(self, keys: Sequence[str], pages: PageBatch) -> list[PageStatus]:
        self.spans.append(len(pages.lengths_bytes))
        return super().put(keys, pages)


class SlowBlock(HostBlock):
    """A device that copies slowly."""

    def pack(self, pages: PageBatch) -> None:
        time.sleep(0.02)
        super().pack(pages)

    def unpack(self, pages: PageBatch, rows: Sequence[int]) -> None:
        time.sleep(0.02)
        super().unpack(pages, rows)


@pytest.fixture
def pool() -> MemoryPool:
    return MemoryPool()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(11)


class TestPackedOverMemory(StoreContract):
    """Blocks of 4 KiB: most batches take several calls, the largest pages do not fit."""

    @pytest.fixture
    def store_factory(self, pool: MemoryPool) -> StoreFactory:
        def make(context: StoreContext) -> PageStore:
            store = PackedStore(MemoryStore(pool), "packed", HostBlock, LENGTHS, 4096)
            store.open(context)
            assert store.packs
            return store

        return make


class TestPackedOverLocal(StoreContract):
    @pytest.fixture
    def store_factory(self, tmp_path: Path) -> StoreFactory:
        def make(context: StoreContext) -> PageStore:
            inner = create({"path": str(tmp_path), "size_bytes": 64 << 20})
            store = PackedStore(inner, "packed", HostBlock, LENGTHS)
            store.open(context)
            return store

        return make


def opened(
    store: PageStore,
    mode: str,
    context: StoreContext = DEVICE,
    make_block: MakeBlock = HostBlock,
    bind_thread: Callable[[], None] = lambda: None,
) -> PackedStore:
    made = PackedStore(store, mode, make_block, LENGTHS, bind_thread=bind_thread)  # type: ignore
    made.open(context)
    return made


# --- what the pool sees


def test_servers_that_pack_and_servers_that_scatter_share_pages(
    pool: MemoryPool, rng: np.random.Generator
) -> None:
    stores: list[PageStore] = [MemoryStore(pool), opened(MemoryStore(pool), "packed")]
    stores[0].open(DEVICE)
    for writer, reader in (stores, stores[::-1]):
        arena, keys = Arena(), new_keys(5)
        source = arena.place(5, LENGTHS, rng)
        arena.scramble(rng)
        expected = [arena.read(source, row) for row in range(5)]
        assert writer.put(keys, source) == [OK] * 5
        assert [pool.read(key) for key in keys] == expected
        target = arena.place(5, LENGTHS, rng)
        assert reader.get(keys, target) == [OK] * 5
        assert [arena.read(target, row) for row in range(5)] == expected


def test_a_packed_page_is_one_span_in_memory_that_the_pool_was_told_of(
    pool: MemoryPool, rng: np.random.Generator
) -> None:
    inner = SpanStore(pool, 0, 0)
    store, arena, keys = opened(inner, "packed"), Arena(), new_keys(3)
    pages = arena.place(3, LENGTHS, rng)
    seen: list[np.ndarray] = []
    put = inner.put
    inner.put = lambda keys, pages: seen.append(pages.addresses) or put(keys, pages)  # type: ignore
    assert store.put(keys, pages) == [OK] * 3
    assert store.get(keys, pages) == [OK] * 3
    assert inner.spans == [1, 1]
    assert inner.context is not None
    (addresses,) = seen
    assert any(
        region.address <= addresses.min()
        and addresses.max() + sum(LENGTHS) <= region.address + region.length_bytes
        for region in inner.context.regions
    )


def test_a_page_that_did_not_arrive_leaves_its_memory_alone(
    pool: MemoryPool, rng: np.random.Generator
) -> None:
    inner = MemoryStore(pool)
    store, arena, keys = opened(inner, "packed"), Arena(), new_keys(4)
    pages = arena.place(4, LENGTHS, rng)
    arena.scramble(rng)
    assert store.put(keys, pages) == [OK] * 4
    expected = [arena.read(pages, row) for row in range(4)]
    pool.drop(keys[1])
    inner.faults["get"].statuses[keys[2]] = UNAVAILABLE
    arena.scramble(rng)
    before = [arena.read(pages, row) for row in range(4)]
    assert store.get(keys, pages) == [OK, MISSING, UNAVAILABLE, OK]
    after = [arena.read(pages, row) for row in range(4)]
    assert after == [expected[0], before[1], before[2], expected[3]]


def test_what_cannot_be_packed_is_left_to_the_store(
    pool: MemoryPool, rng: np.random.Generator
) -> None:
    inner = SpanStore(pool, 0, 0)
    store = PackedStore(inner, "packed", HostBlock, LENGTHS, 4096)
    store.open(StoreContext())
    large = Arena().place(1, (4096, 16), rng)
    assert store.put(new_keys(1), large) == [OK]
    assert inner.spans == [2]
    with pytest.raises(ValueError, match="2 keys for 1 pages"):
        store.put(new_keys(2), large)


def test_a_store_that_loses_an_answer_is_found_out(
    pool: MemoryPool, rng: np.random.Generator
) -> None:
    inner = MemoryStore(pool)
    store, pages, keys = opened(inner, "packed"), Arena().place(2, LENGTHS, rng), new_keys(2)
    inner.get = lambda keys, pages: [OK]  # type: ignore[method-assign]
    with pytest.raises(StoreError, match="1 answers for 2 keys"):
        store.get(keys, pages)


def test_a_call_that_fails_gives_its_block_back(pool: MemoryPool, rng: np.random.Generator) -> None:
    inner = MemoryStore(pool)
    store, pages, keys = opened(inner, "packed"), Arena().place(2, LENGTHS, rng), new_keys(2)
    inner.faults["put"].fails_after_keys = 0
    for _ in range(2 * packed.BLOCKS):
        with pytest.raises(StoreUnavailable):
            store.put(keys, pages)
    inner.faults["put"].fails_after_keys = None
    assert store.put(keys, pages) == [OK, OK]


def test_a_load_does_not_wait_for_a_store_that_hangs(
    pool: MemoryPool, rng: np.random.Generator
) -> None:
    inner = MemoryStore(pool)
    store, pages, keys = opened(inner, "packed"), Arena().place(4, LENGTHS, rng), new_keys(4)
    half = [PageBatch(pages.addresses[part], LENGTHS) for part in (slice(0, 2), slice(2, 4))]
    assert store.put(keys[:2], half[0]) == [OK, OK]
    inner.faults["put"].hold()
    writer = threading.Thread(target=store.put, args=(keys[2:], half[1]))
    writer.start()
    assert inner.faults["put"].entered.wait(30)
    assert store.get(keys[:2], half[0]) == [OK, OK]
    inner.faults["put"].release()
    writer.join(30)
    assert store.exists(keys) == [OK] * 4


# --- the choice


def test_auto_packs_where_the_pool_is_slow_for_each_span(
    pool: MemoryPool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        store = opened(SpanStore(pool, span_ms=1.0, byte_ms=0), "auto")
    assert store.packs
    assert "transfer auto: packed" in caplog.text


def test_auto_scatters_where_the_copy_costs_more_than_the_spans(
    pool: MemoryPool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        store = opened(SpanStore(pool, 0, byte_ms=0.001), "auto", make_block=SlowBlock)
    assert not store.packs
    assert "transfer auto: scatter" in caplog.text


def test_a_measurement_leaves_a_few_shared_keys_however_often_servers_start(
    pool: MemoryPool,
) -> None:
    for _ in range(3):
        opened(MemoryStore(pool), "auto").close()
    assert len(pool) == packed.PROBE_PAGES
    left = pool.keys()
    assert all(key.startswith("ad1:transfer:-:") for key in left)
    assert pool.used_bytes == packed.PROBE_PAGES * sum(LENGTHS)


def test_a_pool_that_cannot_be_measured_is_scattered_to(
    pool: MemoryPool, caplog: pytest.LogCaptureFixture
) -> None:
    inner = MemoryStore(pool)
    inner.faults["put"].fails_after_keys = 0
    assert not opened(inner, "auto").packs
    assert "could not be measured: put: injected" in caplog.text


def test_a_pool_that_hangs_in_the_measurement_holds_no_start_up(
    pool: MemoryPool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "PROBE_LIMIT_S", 0.2)
    inner = MemoryStore(pool)
    inner.faults["get"].hold()
    store = opened(inner, "auto")
    assert not store.packs
    assert "no answer within" in caplog.text
    inner.faults["get"].release()
    store.close()
    assert inner.closes == 1


def test_a_pool_that_still_hangs_at_close_is_left_open(
    pool: MemoryPool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store is closed when its calls have returned: a native one may crash the process."""
    monkeypatch.setattr(packed, "PROBE_LIMIT_S", 0.2)
    monkeypatch.setattr(packed, "PROBE_CLOSE_S", 0.2)
    inner = MemoryStore(pool)
    inner.faults["get"].hold()
    store = opened(inner, "auto")
    store.close()
    assert inner.closes == 0
    assert "leaving it behind" in caplog.text
    inner.faults["get"].release()


def test_the_thread_that_measures_has_the_device(pool: MemoryPool) -> None:
    """A native call of a thread without one fails, or works on device 0."""
    inner, bound, called = MemoryStore(pool), set[int](), set[int]()
    inner.faults["get"].before = lambda keys: called.add(threading.get_ident())
    opened(inner, "auto", bind_thread=lambda: bound.add(threading.get_ident()))
    assert called == bound != set()


def test_blocks_that_the_pool_was_told_of_stay_while_it_is_open(pool: MemoryPool) -> None:
    made: list[weakref.ref[HostBlock]] = []

    def make_block(size_bytes: int) -> HostBlock:
        block = SlowBlock(size_bytes)
        made.append(weakref.ref(block))
        return block

    store = opened(SpanStore(pool, 0, byte_ms=0.001), "auto", make_block=make_block)
    gc.collect()
    assert not store.packs
    assert [block() is not None for block in made] == [True, True]


def test_a_pool_that_is_tried_again_is_told_of_the_same_blocks(pool: MemoryPool) -> None:
    """With on_pool_unavailable: degrade a store is opened until that works."""

    class LateStore(MemoryStore):
        regions: tuple[tuple[Region, ...], ...] = ()

        def open(self, context: StoreContext) -> None:
            self.regions = (*self.regions, context.regions)
            if len(self.regions) < 3:
                raise StoreUnavailable("open", "not yet")
            super().open(context)

    inner = LateStore(pool)
    store = PackedStore(inner, "packed", HostBlock, LENGTHS)
    for _ in range(2):
        with pytest.raises(StoreUnavailable):
            store.open(DEVICE)
    store.open(DEVICE)
    assert store.packs
    assert len(set(inner.regions)) == 1


def test_auto_neither_measures_nor_packs_host_memory(pool: MemoryPool) -> None:
    store = opened(MemoryStore(pool), "auto", StoreContext())
    assert not store.packs
    assert len(pool) == 0


def test_without_a_compiler_auto_scatters_and_packed_is_refused(
    pool: MemoryPool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(page_packer, "LIBRARY", "ascend_direct.store._was_not_built")
    store = opened(MemoryStore(pool), "auto")
    assert not store.packs
    assert "transfer auto: scatter" in caplog.text
    assert "C++ compiler" in caplog.text
    with pytest.raises(ConfigError, match="set transfer to scatter"):
        opened(MemoryStore(pool), "packed")


class KernelThatDoesNotCompile(HostBlock):
    """Says so at its first launch, as Triton does."""

    def pack(self, pages: PageBatch) -> None:
        raise OSError("bishengir-compile: not found")


def test_a_block_that_cannot_pack_is_found_out_at_the_start(
    pool: MemoryPool, caplog: pytest.LogCaptureFixture
) -> None:
    store = opened(MemoryStore(pool), "auto", make_block=KernelThatDoesNotCompile)
    assert not store.packs
    assert "bishengir-compile: not found" in caplog.text
    with pytest.raises(ConfigError, match=r"bishengir-compile.*set transfer to scatter"):
        opened(MemoryStore(pool), "packed", make_block=KernelThatDoesNotCompile)


def test_scatter_is_the_store_itself(pool: MemoryPool) -> None:
    inner = MemoryStore(pool)
    assert with_transfer(inner, "scatter", None, Device("cpu")) is inner  # type: ignore[arg-type]
