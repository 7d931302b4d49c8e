# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""What every page store must do: the clauses of `PageStore`'s docstring as tests.

Owns the tests and the memory they use. Does not own how a store is made: a subclass says so.

    class TestMyStore(StoreContract):
        @pytest.fixture
        def store_factory(self, tmp_path):
            def make(context):
                store = MyStore({"path": str(tmp_path)})
                store.open(context)
                return store
            return make

The pool must hold 32 MiB without evicting. Keys are never used twice, so `store` may be overridden
with a wider scope where opening is slow; tests that close a store make their own. A store that
needs aligned memory overrides `alignment_bytes`; one that needs special memory, `arena`.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ascend_direct.errors import StoreUnavailable
from ascend_direct.page_layout import Region
from ascend_direct.store.base import (
    MAX_KEY_BYTES,
    PageBatch,
    PageStatus,
    PageStore,
    StoreContext,
    StoreStats,
)

OK, MISSING, MISMATCH = PageStatus.OK, PageStatus.MISSING, PageStatus.MISMATCH
FAILED = PageStatus.FAILED
StoreFactory = Callable[[StoreContext], PageStore]

SPANS = (96, 96, 48, 96, 16)
BAD_KEYS = {
    "empty": "",
    "one byte too long": "k" * (MAX_KEY_BYTES + 1),
    "too long in bytes, not in characters": "é" * (MAX_KEY_BYTES // 2 + 1),
}

_numbers = itertools.count()
_examples = settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,  # examples share a store, hence the new keys
        HealthCheck.differing_executors,  # one contract, many subclasses
        HealthCheck.too_slow,
    ],
)


class Arena:
    """One piece of host memory: pages lie in it in random order, with guard bytes around spans."""

    def __init__(self, size_bytes: int = 1 << 20, alignment_bytes: int = 1) -> None:
        self.alignment_bytes = alignment_bytes
        self._memory = np.zeros(size_bytes + 4096, dtype=np.uint8)
        skip_bytes = -self._memory.ctypes.data % 4096
        self.bytes = self._memory[skip_bytes : skip_bytes + size_bytes]
        self.address = self.bytes.ctypes.data

    def place(
        self, count: int, lengths_bytes: Sequence[int], rng: np.random.Generator
    ) -> PageBatch:
        """Room for `count` pages; spans and pages are permuted, never adjacent, never overlap."""
        unit, spans = self.alignment_bytes, len(lengths_bytes)
        offsets = np.zeros((count, spans), dtype=np.int64)
        end = unit
        for slot in rng.permutation(count * spans).tolist():
            page, span = divmod(slot, spans)
            offsets[page, span] = end
            gap_units = int(rng.integers(1, 9))
            end += (-(-lengths_bytes[span] // unit) + gap_units) * unit
        assert end <= len(self.bytes), "the arena is too small for this test"
        return PageBatch(offsets + self.address, tuple(lengths_bytes))

    def scramble(self, rng: np.random.Generator) -> None:
        """Random bytes everywhere, guards included."""
        self.bytes[:] = np.frombuffer(rng.bytes(len(self.bytes)), dtype=np.uint8)

    def read(self, pages: PageBatch, row: int) -> bytes:
        """What page `row` holds, in stored order."""
        return b"".join(self.bytes[a:b].tobytes() for a, b in self._runs(pages, row))

    def write(self, pages: PageBatch, row: int, data: bytes) -> None:
        """Make page `row` hold `data`."""
        done = 0
        for start, end in self._runs(pages, row):
            self.bytes[start:end] = np.frombuffer(data[done : done + end - start], dtype=np.uint8)
            done += end - start

    def outside(self, pages: PageBatch) -> bytes:
        """Everything but the spans of `pages`."""
        rest = self.bytes.copy()
        for row in range(len(pages)):
            for start, end in self._runs(pages, row):
                rest[start:end] = 0
        return rest.tobytes()

    def _runs(self, pages: PageBatch, row: int) -> Iterator[tuple[int, int]]:
        spans = zip(pages.addresses[row].tolist(), pages.lengths_bytes, strict=True)
        for address, length_bytes in spans:
            yield address - self.address, address - self.address + length_bytes


def new_keys(count: int) -> list[str]:
    """Keys that no test has used, of the length real ones have."""
    return [f"ad1:{next(_numbers):016x}:0:{'c0de' * 16}" for _ in range(count)]


def content(rng: np.random.Generator, size_bytes: int) -> bytes:
    return bytes(rng.bytes(size_bytes))


class StoreContract:
    """Inherit, provide `store_factory`, and your store is tested."""

    alignment_bytes = 1

    @pytest.fixture
    def store_factory(self) -> StoreFactory:
        """Makes and opens a store; overridden by the subclass."""
        raise NotImplementedError("a store contract needs the fixture store_factory")

    @pytest.fixture
    def arena(self) -> Arena:
        """Memory for pages; every address a test uses lies in it."""
        return Arena(alignment_bytes=self.alignment_bytes)

    @pytest.fixture
    def context(self, arena: Arena) -> StoreContext:
        region = Region(arena.address, len(arena.bytes))
        return StoreContext(page_bytes=self._page_bytes(), regions=(region,))

    @pytest.fixture
    def store(self, store_factory: StoreFactory, context: StoreContext) -> Iterator[PageStore]:
        """An open store, closed after the test."""
        store = store_factory(context)
        yield store
        store.close()

    @pytest.fixture
    def rng(self) -> np.random.Generator:
        return np.random.default_rng(20240607)

    def _lengths(self, lengths: Sequence[int] = SPANS) -> tuple[int, ...]:
        return tuple(length * self.alignment_bytes for length in lengths)

    def _page_bytes(self) -> int:
        return sum(self._lengths())

    def _stored(
        self, store: PageStore, arena: Arena, rng: np.random.Generator, count: int
    ) -> dict[str, bytes]:
        """Put `count` new pages; their keys and bytes."""
        pages = arena.place(count, self._lengths(), rng)
        arena.scramble(rng)
        keys = new_keys(count)
        expected = {key: arena.read(pages, row) for row, key in enumerate(keys)}
        assert store.put(keys, pages) == [OK] * count
        return expected

    # --- whole pages, from and to wherever the spans lie

    @_examples
    @given(
        count=st.integers(1, 12),
        lengths=st.lists(st.sampled_from([1, 3, 16, 64, 257, 1024]), min_size=1, max_size=9),
        seed=st.integers(0, 2**32 - 1),
    )
    def test_a_page_comes_back_whole_and_nothing_beside_its_spans_changes(
        self, store: PageStore, arena: Arena, count: int, lengths: list[int], seed: int
    ) -> None:
        rng = np.random.default_rng(seed)
        source = arena.place(count, self._lengths(lengths), rng)
        arena.scramble(rng)
        before, keys = arena.bytes.tobytes(), new_keys(count)
        expected = [arena.read(source, row) for row in range(count)]
        assert store.put(keys, source) == [OK] * count
        assert arena.bytes.tobytes() == before, "put changed memory"

        target = arena.place(count, self._lengths(lengths), rng)
        arena.scramble(rng)
        guards, order = arena.outside(target), rng.permutation(count).tolist()
        assert store.get([keys[i] for i in order], target) == [OK] * count
        assert [arena.read(target, row) for row in range(count)] == [expected[i] for i in order]
        assert arena.outside(target) == guards

    def test_a_stored_page_is_the_concatenation_of_its_spans(
        self, store: PageStore, arena: Arena, rng: np.random.Generator
    ) -> None:
        (key,) = new_keys(1)
        source = arena.place(1, self._lengths((64, 32, 96)), rng)
        arena.scramble(rng)
        expected = arena.read(source, 0)
        assert store.put([key], source) == [OK]
        target = arena.place(1, self._lengths((16, 128, 16, 32)), rng)
        assert store.get([key], target) == [OK]
        assert arena.read(target, 0) == expected

    def test_memory_may_change_once_put_has_returned(
        self, store: PageStore, arena: Arena, rng: np.random.Generator
    ) -> None:
        expected = self._stored(store, arena, rng, 4)
        arena.scramble(rng)
        target = arena.place(4, self._lengths(), rng)
        assert store.get(list(expected), target) == [OK] * 4
        assert [arena.read(target, row) for row in range(4)] == list(expected.values())

    def test_a_large_batch_is_one_call(
        self, store: PageStore, arena: Arena, rng: np.random.Generator
    ) -> None:
        count = min(300, len(arena.bytes) // (4 * self._page_bytes()))
        expected = self._stored(store, arena, rng, count)
        target = arena.place(count, self._lengths(), rng)
        assert store.exists(list(expected)) == [OK] * count
        assert store.get(list(expected), target) == [OK] * count
        assert [arena.read(target, row) for row in range(count)] == list(expected.values())

    # --- first write wins

    def test_the_first_write_of_a_key_wins_and_the_second_is_answered_ok(
        self, store: PageStore, arena: Arena, rng: np.random.Generator
    ) -> None:
        ((key, expected),) = self._stored(store, arena, rng, 1).items()
        for lengths in (SPANS, (*SPANS, 32)):
            other = arena.place(1, self._lengths(lengths), rng)
            arena.scramble(rng)
            assert store.put([key], other) == [OK]
        target = arena.place(1, self._lengths(), rng)
        assert store.get([key], target) == [OK]
        assert arena.read(target, 0) == expected

    def test_a_key_given_twice_in_one_put_holds_one_of_the_pages_whole(
        self, store: PageStore, arena: Arena, rng: np.random.Generator
    ) -> None:
        (key,) = new_keys(1)
        pages = arena.place(2, self._lengths(), rng)
        arena.scramble(rng)
        written = [arena.read(pages, row) for row in range(2)]
        assert store.put([key, key], pages) == [OK, OK]
        assert store.get([key, key], pages) == [OK, OK]
        assert arena.read(pages, 0) == arena.read(pages, 1)
        assert arena.read(pages, 0) in written

    # --- per key, in order

    @_examples
    @given(held=st.lists(st.booleans(), max_size=40), seed=st.integers(0, 2**32 - 1))
    def test_answers_come_in_the_order_of_the_keys(
        self, store: PageStore, arena: Arena, held: list[bool], seed: int
    ) -> None:
        rng = np.random.default_rng(seed)
        expected = self._stored(store, arena, rng, sum(held)) if any(held) else {}
        known = iter(expected)
        keys = [next(known) if is_held else new_keys(1)[0] for is_held in held]
        answers = [OK if is_held else MISSING for is_held in held]
        target = arena.place(len(keys), self._lengths(), rng)
        guards = arena.outside(target)
        assert store.exists(keys) == answers
        assert store.get(keys, target) == answers
        assert arena.outside(target) == guards
        for row, key in enumerate(keys):
            assert not held[row] or arena.read(target, row) == expected[key]

    @pytest.mark.parametrize("extra", [-16, -1, 1, 4096], ids="{:+d} units".format)
    def test_an_object_of_another_size_is_a_mismatch_and_its_neighbours_are_not(
        self, store: PageStore, arena: Arena, rng: np.random.Generator, extra: int
    ) -> None:
        (odd,) = new_keys(1)
        assert store.put([odd], arena.place(1, self._lengths((sum(SPANS) + extra,)), rng)) == [OK]
        first, last = expected = self._stored(store, arena, rng, 2)
        target = arena.place(3, self._lengths(), rng)
        guards = arena.outside(target)
        assert store.exists([first, odd, last]) == [OK] * 3
        assert store.get([first, odd, last], target) == [OK, MISMATCH, OK]
        assert arena.outside(target) == guards
        assert [arena.read(target, 0), arena.read(target, 2)] == list(expected.values())

    @pytest.mark.parametrize("bad", BAD_KEYS.values(), ids=BAD_KEYS.keys())
    def test_a_bad_key_fails_alone(
        self, store: PageStore, arena: Arena, rng: np.random.Generator, bad: str
    ) -> None:
        first, last = new_keys(2)
        keys, pages = [first, bad, last], arena.place(3, self._lengths(), rng)
        arena.scramble(rng)
        written = arena.bytes.tobytes()
        assert store.exists(keys) == [MISSING, FAILED, MISSING]
        assert store.get(keys, pages) == [MISSING, FAILED, MISSING]
        arena.bytes[:] = np.frombuffer(written, dtype=np.uint8)
        expected = [arena.read(pages, row) for row in (0, 2)]
        assert store.put(keys, pages) == [OK, FAILED, OK]
        arena.scramble(rng)
        assert store.exists(keys) == [OK, FAILED, OK]
        assert store.get(keys, pages) == [OK, FAILED, OK]
        assert [arena.read(pages, row) for row in (0, 2)] == expected

    def test_the_longest_key_works_and_its_last_byte_counts(
        self, store: PageStore, arena: Arena, rng: np.random.Generator
    ) -> None:
        stem = new_keys(1)[0].ljust(MAX_KEY_BYTES - 1, "k")
        keys, pages = [stem + "a", stem + "b", stem + "c"], arena.place(2, self._lengths(), rng)
        arena.scramble(rng)
        expected = [arena.read(pages, row) for row in range(2)]
        assert store.put(keys[:2], pages) == [OK, OK]
        assert store.exists(keys) == [OK, OK, MISSING]
        arena.scramble(rng)
        assert store.get(keys[:2], pages) == [OK, OK]
        assert [arena.read(pages, row) for row in range(2)] == expected

    def test_empty_batches_are_answered_with_nothing(
        self, store: PageStore, arena: Arena, rng: np.random.Generator
    ) -> None:
        pages = arena.place(0, self._lengths(), rng)
        assert (store.exists([]), store.get([], pages), store.put([], pages)) == ([], [], [])

    @_examples
    @given(data=st.data())
    def test_any_sequence_of_calls_agrees_with_a_dictionary(
        self, store: PageStore, arena: Arena, data: st.DataObject
    ) -> None:
        keys, model = new_keys(5), dict[str, bytes]()
        some_keys = st.lists(st.sampled_from(keys), max_size=6, unique=True)
        steps = st.tuples(
            st.sampled_from(["exists", "get", "put"]),
            some_keys,
            st.sampled_from([(64, 16), (16, 64), (64, 17)]),
            st.integers(0, 2**32 - 1),
        )
        for operation, chosen, lengths, seed in data.draw(st.lists(steps, max_size=12)):
            if operation == "exists":
                answers = [OK if key in model else MISSING for key in chosen]
                assert store.exists(chosen) == answers
                continue
            rng = np.random.default_rng(seed)
            pages = arena.place(len(chosen), self._lengths(lengths), rng)
            arena.scramble(rng)
            if operation == "put":
                for row, key in enumerate(chosen):
                    model.setdefault(key, arena.read(pages, row))
                assert store.put(chosen, pages) == [OK] * len(chosen)
                continue
            guards = arena.outside(pages)
            for row, answer in enumerate(store.get(chosen, pages)):
                held = model.get(chosen[row])
                fits = held is not None and len(held) == pages.page_bytes
                assert answer == (OK if fits else MISSING if held is None else MISMATCH)
                assert answer is not OK or arena.read(pages, row) == held
            assert arena.outside(pages) == guards

    # --- threads

    def test_many_threads_at_once_get_whole_pages(
        self, store: PageStore, arena: Arena, rng: np.random.Generator
    ) -> None:
        threads, rounds, shared = 8, 12, new_keys(6)
        lengths, size_bytes = self._lengths(), self._page_bytes()
        placed = arena.place(threads * len(shared) * 2, lengths, rng)
        start = threading.Barrier(threads)

        def work(number: int) -> None:
            """Write shared keys and own keys, and read them back, all filled with one byte."""
            first = number * len(shared) * 2
            rows = placed.addresses[first : first + len(shared) * 2]
            pages = PageBatch(rows, lengths)
            start.wait()
            for _ in range(rounds):
                keys = [*shared, *new_keys(len(shared))]
                for row in range(len(keys)):
                    arena.write(pages, row, bytes([number + 1]) * size_bytes)
                assert store.put(keys, pages) == [OK] * len(keys)
                assert store.exists(keys) == [OK] * len(keys)
                assert store.get(keys, pages) == [OK] * len(keys)
                for row in range(len(keys)):
                    page = arena.read(pages, row)
                    assert page == page[:1] * size_bytes, "a page of two writers"
                    assert page[0] == number + 1 or row < len(shared)

        with ThreadPoolExecutor(threads) as pool:
            for done in [pool.submit(work, number) for number in range(threads)]:
                done.result()

    # --- the end

    def test_after_close_every_call_says_unavailable_and_close_twice_is_fine(
        self,
        store_factory: StoreFactory,
        context: StoreContext,
        arena: Arena,
        rng: np.random.Generator,
    ) -> None:
        store = store_factory(context)
        keys, pages = list(self._stored(store, arena, rng, 2)), arena.place(2, self._lengths(), rng)
        nothing = arena.place(0, self._lengths(), rng)
        store.close()
        store.close()
        before = arena.bytes.tobytes()
        calls: list[Callable[[], object]] = [
            lambda: store.exists(keys),
            lambda: store.get(keys, pages),
            lambda: store.put(keys, pages),
            lambda: store.exists([]),
            lambda: store.get([], nothing),
            lambda: store.put([], nothing),
        ]
        for call in calls:
            with pytest.raises(StoreUnavailable):
                call()
        assert arena.bytes.tobytes() == before

    def test_stats_never_raise_open_or_closed(
        self,
        store_factory: StoreFactory,
        context: StoreContext,
        arena: Arena,
        rng: np.random.Generator,
    ) -> None:
        store = store_factory(context)
        self._stored(store, arena, rng, 3)
        stats = store.stats()
        assert isinstance(stats, StoreStats)
        assert stats.pages is None or stats.pages >= 3
        assert stats.used_bytes is None or stats.used_bytes >= 3 * self._page_bytes()
        store.close()
        assert isinstance(store.stats(), StoreStats)

    def test_a_store_has_a_name(self, store: PageStore) -> None:
        assert isinstance(store.name, str)
        assert store.name
