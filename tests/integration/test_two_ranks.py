# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""TP=2: whatever happens on one rank, both take the same branch; bytes and trees stay right.

SGLang's rank-consensus checker watches in both processes and ends a rank that diverges.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .rank_pair import RankPair

PAGES = 192 // 16
STEPS = 1_000
KINDS = ("gqa", "mla")


@pytest.fixture(scope="module")
def _pairs() -> Iterator[list[RankPair]]:
    pairs: list[RankPair] = []
    yield pairs
    for pair in pairs:
        pair.close()


@pytest.fixture
def pair(_pairs: list[RankPair], tmp_path_factory: pytest.TempPathFactory) -> RankPair:
    """Two running ranks; a test that broke them leaves the next one new ones."""
    if not _pairs or not _pairs[-1].usable:
        _pairs.append(RankPair(tmp_path_factory.mktemp("ranks")))
    return _pairs[-1]


def test_the_consensus_checker_of_sglang_watches(pair) -> None:
    assert pair.checked


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_look_ahead_together(pair, kind) -> None:
    ranks = pair.run("hit", kind=kind, config={"load_mode": "lookahead"})
    assert [rank["storage"] for rank in ranks] == [192, 192]
    assert sum(rank["read"] for rank in ranks) == PAGES * (1 if kind == "mla" else 2)


@pytest.mark.parametrize("core", ["rust", "python"])
@pytest.mark.parametrize("kind", ["gqa", "gqa_narrow_v", "mla"])
def test_what_two_ranks_computed_two_ranks_load(pair, kind, core) -> None:
    for rank in pair.run("hit", kind=kind, core=core):
        assert (rank["device"], rank["host"], rank["storage"]) == (0, 0, 192)


@pytest.mark.parametrize("kind", ["gqa", "mla"])
def test_what_write_back_pins_is_counted_whole_where_ranks_store_a_share(pair, kind) -> None:
    assert pair.run("pinned", kind=kind) == [12, 12]


def test_each_rank_moves_its_own_heads(pair) -> None:
    for rank in pair.run("hit", kind="gqa"):
        assert rank["objects"] == 2 * PAGES
        assert rank["written"] == rank["read"] == PAGES


def test_replicated_pages_are_written_and_read_once_in_even_shares(pair) -> None:
    ranks = pair.run("hit", kind="mla", config={"replica_read": "sharded"})
    for moved in ("written", "read"):
        assert sum(rank[moved] for rank in ranks) == PAGES
        assert abs(ranks[0][moved] - ranks[1][moved]) <= 1
    assert sum(rank["read_bytes"] for rank in ranks) == PAGES * ranks[0]["page_bytes"]
    assert ranks[0]["objects"] == PAGES


def test_every_rank_may_read_all_replicated_pages(pair) -> None:
    for rank in pair.run("hit", kind="mla", config={"replica_read": "every_rank"}):
        assert rank["read"] == PAGES


def test_both_ways_to_read_replicated_pages_are_tried_alike(pair) -> None:
    first, second = pair.run("many_hits", kind="mla", loads=8)
    assert first == second
    assert set(first) == {PAGES // 2, PAGES}


@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("what", ["lost", "raises", "crashes", "late"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_load_that_fails_on_one_rank_is_recomputed_on_both(pair, kind, what, where) -> None:
    ranks = pair.run("load_with_fault", kind=kind, what=what, where=where)
    assert [rank["elsewhere"] for rank in ranks] == [int(n != where) for n in range(2)]
    for rank in ranks:
        assert rank["storage"] == 0
        assert rank["withheld"] == (192 if what == "late" else 0)
        assert rank["again"] == 192


@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize(("how", "storage"), [("lost", 112), ("late", 0), ("fails", 0)])
@pytest.mark.parametrize("kind", KINDS)
def test_both_ranks_load_what_both_can_see(pair, kind, how, storage, where) -> None:
    got = pair.run("fewer_pages", kind=kind, how=how, where=where)
    if kind == "mla" and how != "lost" and where == 1:
        storage = 16  # rank 1 knows nothing of its share, which begins with the second page
    assert got == [storage, storage]


@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("what", ["fails", "full", "hangs"])
def test_a_store_that_fails_on_one_rank_unpins_on_both(pair, what, where) -> None:
    ranks = pair.run("store_with_fault", what=what, where=where)
    assert [rank["again"] for rank in ranks] == [192, 192]
    if what != "hangs":
        assert ranks[where]["failed"] > 0
        assert ranks[1 - where]["failed"] == 0


@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_that_reach_a_late_pool_one_by_one_use_it_together(pair, kind, where) -> None:
    for rank in pair.run("attach_one_after_the_other", kind=kind, where=where):
        assert rank["got"][0] == 0, "nobody has reached it"
        # Of MLA pages rank 0's share begins with the first, and that one it can answer for alone.
        alone = 16 if (kind, where) == ("mla", 0) else 0
        assert rank["got"][1] == alone, "one rank has"
        assert rank["got"][2] == 192, "both have"


@pytest.mark.parametrize(
    ("kind", "heads_per_object", "storage"), [("gqa", 1, 192), ("gqa", 0, 0), ("mla", 0, 192)]
)
def test_servers_of_other_tp_sizes_share_pages(pair, kind, heads_per_object, storage) -> None:
    first, second = pair.run("other_tp_size", kind=kind, heads_per_object=heads_per_object)
    assert first == [storage, storage]  # one rank's own TP=1 server, then both ranks again
    assert second == [storage]


@pytest.mark.timeout(400)
@pytest.mark.parametrize("load_mode", ["sync", "lookahead"])
@pytest.mark.parametrize(("kind", "core"), [("gqa", "rust"), ("mla", "python")])
def test_a_random_walk_of_two_ranks_ends_with_equal_trees(pair, kind, core, load_mode) -> None:
    options = {"kind": kind, "core": core, "steps": STEPS, "load_mode": load_mode}
    totals = pair.run("random_walk", limit_s=360.0, **options)
    for total in totals:
        assert total["loads"] >= 3
        assert total["stores"] >= 20
    assert sum(total["loads_failed"] + total["loads_late"] for total in totals) >= 3
