# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Pages stored by groups of heads are found across TP sizes; replicated pages move once."""

from __future__ import annotations

import logging
import socket
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st

from ascend_direct.integration.heads import HeadRange, stored_by_heads
from ascend_direct.integration.replicas import LOOK_AGAIN_AFTER, Exchange, ReadChoice, Shard
from ascend_direct.page_layout import PageLayout, Span

PAGES, PAGE, LAYERS, DIM = 9, 4, 2, 8


class RankPool:
    """KV memory of one rank: uint8 [layers, k/v, slots, heads, dim], token by token."""

    def __init__(self, heads: int, tag: str = "nhd") -> None:
        shape = (LAYERS, 2, PAGES * PAGE, heads, DIM)
        if tag == "hnd":
            shape = (LAYERS, 2, PAGES, heads, PAGE * DIM)
        self.memory = np.zeros(shape, np.uint8)
        length = PAGE * heads * DIM
        spans = tuple(
            Span(layer, part, self.memory[layer, i].ctypes.data, length, length)
            for layer in range(LAYERS)
            for i, part in enumerate("kv")
        )
        self.layout = PageLayout(spans, PAGES, PAGE, tag, (("head_num", heads),))

    def objects(self, layout: PageLayout, page: int) -> list[bytes]:
        """A page's stored objects, read through the layout's addresses."""
        import ctypes

        rows = layout.addresses(np.array([page]))
        return [
            b"".join(
                ctypes.string_at(int(address), length)
                for address, length in zip(row, layout.lengths_bytes, strict=True)
            )
            for row in rows
        ]


def dealt(total: int, size: int) -> list[HeadRange]:
    return [HeadRange.of_rank(max(1, total // size), total, rank, size) for rank in range(size)]


@pytest.mark.parametrize("tag", ["nhd", "hnd"])
@settings(deadline=None, max_examples=60)
@given(data=st.data(), total=st.sampled_from([1, 2, 4, 8]))
def test_ranks_of_any_tp_size_store_the_same_heads_as_the_same_bytes(
    tag: str, data: st.DataObject, total: int
) -> None:
    sizes = [size for size in (1, 2, 4, 8) if size <= total]
    step = total // max(sizes)
    seed = data.draw(st.integers(0, 1000))
    values = np.random.default_rng(seed).integers(0, 256, (LAYERS, 2, PAGE, total, DIM), np.uint8)
    page, seen = data.draw(st.integers(1, PAGES - 1)), {}
    digests = set()
    for size in sizes:
        for heads in dealt(total, size):
            pool = RankPool(heads.held, tag)
            share = values[:, :, :, heads.first : heads.first + heads.held]
            if tag == "nhd":
                pool.memory[:, :, page * PAGE : (page + 1) * PAGE] = share
            else:
                moved = share.transpose(0, 1, 3, 2, 4)
                pool.memory[:, :, page] = moved.reshape(LAYERS, 2, heads.held, PAGE * DIM)
            layout = stored_by_heads(pool.layout, heads, step)
            digests.add(layout.digest())
            parts = heads.parts(layout.objects_per_page)
            for part, content in zip(parts, pool.objects(layout, page), strict=True):
                assert seen.setdefault(part, content) == content
    assert len(digests) == 1
    assert len(seen) == total // step


def test_heads_dealt_to_several_ranks_carry_one_range() -> None:
    assert [heads.parts(1) for heads in dealt(2, 8)] == [["h0-0"]] * 4 + [["h1-1"]] * 4


def test_whole_ranks_of_different_tp_sizes_never_share_a_key() -> None:
    parts = {(size, part) for size in (1, 2, 4) for h in dealt(8, size) for part in h.parts(1)}
    assert len({part for _, part in parts}) == len(parts) == 7


def test_heads_that_do_not_add_up_are_told_and_isolated(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert HeadRange.of_rank(3, 8, 0, 2).first is None
    assert "this TP size only" in caplog.text


def test_padded_heads_are_isolated(caplog: pytest.LogCaptureFixture) -> None:
    """On a CPU SGLang pads 2 heads to 4 ranks: rank 1 then holds head 1, not head 0 again."""
    with caplog.at_level(logging.WARNING):
        assert HeadRange.of_rank(1, 2, 1, 4, padded=True).first is None
    assert HeadRange.of_rank(1, 2, 1, 4).first == 0


def test_heads_that_cannot_be_cut_are_told_and_stored_whole(
    caplog: pytest.LogCaptureFixture,
) -> None:
    pool = RankPool(4)
    with caplog.at_level(logging.WARNING):
        layout = stored_by_heads(pool.layout, HeadRange(0, 4, 8), 3)
    assert layout is pool.layout
    assert "heads_per_object=3" in caplog.text


@given(total=st.integers(0, 200), size=st.integers(1, 16), shift=st.integers(0, 1000))
def test_shares_cover_all_items_once_and_differ_by_one_at_most(
    total: int, size: int, shift: int
) -> None:
    items = list(range(total))
    shares = [Shard(rank, size).shifted(shift).of(items) for rank in range(size)]
    assert sorted(item for share in shares for item in share) == items
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(size=st.integers(1, 8), held=st.lists(st.booleans(), max_size=60))
def test_the_smallest_prefix_of_all_shares_is_the_stored_prefix(
    size: int, held: list[bool]
) -> None:
    prefixes = []
    for rank in range(size):
        mine = Shard(rank, size).of(held)
        leading = next((i for i, there in enumerate(mine) if not there), len(mine))
        prefixes.append(Shard(rank, size).prefix(leading, len(held)))
    assert min(prefixes) == next((i for i, there in enumerate(held) if not there), len(held))


def test_pages_of_uneven_offloads_do_not_pile_up_on_one_rank() -> None:
    size, offered = 4, 0
    counts = [0] * size
    for pages in [1] * 37 + [3] * 5 + [7]:
        for rank in range(size):
            counts[rank] += len(Shard(rank, size).shifted(offered).of(range(pages)))
        offered += pages
    assert max(counts) - min(counts) <= 1


def costs(choice: ReadChoice, us: dict[bool, int], loads: int) -> list[bool]:
    """Run loads whose agreed costs are given; returns which were sharded."""
    ways = []
    for _ in range(loads):
        way = choice.begin()
        choice.end(way, 1)
        choice.agreed(us[way])
        ways.append(way)
    return ways


@pytest.mark.parametrize("cheap", [True, False])
def test_the_cheaper_way_of_reading_is_learnt_and_the_other_looked_at_again(cheap: bool) -> None:
    ways = costs(ReadChoice("auto"), {cheap: 10, not cheap: 30}, 3 * LOOK_AGAIN_AFTER)
    assert set(ways[:6]) == {True, False}
    later = ways[6:]
    assert 0 < later.count(not cheap) <= 3


def test_a_way_that_became_cheaper_is_noticed() -> None:
    choice = ReadChoice("auto")
    costs(choice, {True: 10, False: 30}, 10)
    ways = costs(choice, {True: 100, False: 20}, 4 * LOOK_AGAIN_AFTER)
    assert ways[-1] is False


@pytest.mark.parametrize(("mode", "way"), [("sharded", True), ("every_rank", False)])
def test_a_fixed_way_is_kept(mode: str, way: bool) -> None:
    assert set(costs(ReadChoice(mode), {True: 1, False: 1000}, 20)) == {way}


def _exchange(rank: int, size: int, port: int, results: Any) -> None:
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=size)
    truth = torch.randint(0, 256, (20, 24), generator=torch.Generator().manual_seed(1)).byte()
    pages = torch.tensor([7, 3, 19, 4, 11, 2, 5])
    memory = torch.zeros_like(truth)
    mine = Shard(rank, size).shifted(4).of(pages)
    memory[mine] = truth[mine]
    views = [memory[:, :10], memory[:, 10:]]
    # Room for two pages a step: several steps, the last one uneven.
    Exchange(views, dist.group.WORLD, Shard(rank, size), batch_bytes=48).share(pages, 4)
    untouched = [i for i in range(1, 20) if i not in pages.tolist()]
    results[rank] = bool((memory[pages] == truth[pages]).all() and not memory[untouched].any())
    dist.destroy_process_group()


@pytest.mark.multi
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_that_read_a_share_each_end_with_all_pages(size: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_exchange, args=(size, port, results), nprocs=size)
        assert dict(results) == dict.fromkeys(range(size), True)
