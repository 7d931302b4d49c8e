# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""The transfer benchmark measures what it says. No figure is judged here: CI is no place for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench import keys_worker, transfer, transfer_report
from bench.shapes import CURVE, SHAPES, Pool

KIB = 1024


@pytest.mark.parametrize(
    ("name", "fragments", "page_bytes"),
    [
        ("deepseek-r1", 122, 61 * (128 + 16) * KIB),
        ("qwen3-32b-tp8", 128, 128 * 32 * KIB),
        ("qwen3-32b-tp1", 128, 128 * 256 * KIB),
        ("qwen2.5-0.5b", 48, 48 * 32 * KIB),
    ],
)
def test_a_shape_has_the_fragments_of_its_model(name: str, fragments: int, page_bytes: int) -> None:
    assert (SHAPES[name].fragments, SHAPES[name].page_bytes) == (fragments, page_bytes)


def test_a_page_that_did_not_arrive_changes_the_checksum() -> None:
    pool, pages = Pool(SHAPES["qwen2.5-0.5b"], 3), np.array([2, 1, 3])
    pool.fill(np.random.default_rng(1))
    expected = pool.checksum(pages)
    pool.buffers[-1][3, -1] ^= 1
    assert pool.checksum(pages) != expected


SMALL = (
    *("--shapes", "qwen2.5-0.5b", "--pages", "2", "--rounds", "2", "--in-flight", "2"),
    *("--other-batches-mib", "1", "--curve", "1", "3", "--stored", "300"),
    *("--asked", "70", "--lookup-rounds", "2", "--thread-pages", "3"),
)


@pytest.mark.memcache
@pytest.mark.sglang
@pytest.mark.multi
def test_a_run_measures_every_part_and_leaves_its_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert transfer.main([*SMALL, "--out", str(tmp_path)]) == 0
    lines = list(map(json.loads, (tmp_path / "transfer.jsonl").read_text().splitlines()))
    by_kind: dict[str, list[Any]] = {}
    for line in lines:
        by_kind.setdefault(line["kind"], []).append(line)
    model, one, three = by_kind["move"]
    ways = {"memcpy", "bare put", "store", "bare get", "bare get, other thread", "load"}
    more = {"bare get x2", "load, 1 MiB a call", "load, packed"}
    assert (model["shape"], set(model["seconds"])) == ("qwen2.5-0.5b", ways | more)
    assert (one["shape"], one["pages"], three["pages"]) == (CURVE, 1, 3)
    assert all(len(took) == 2 and min(took) > 0 for took in model["seconds"].values())
    assert [(n["stored"], n["asked"]) for n in by_kind["lookup"]] == [(300, 70)]
    (members,) = by_kind["members"]
    assert len(members["used_bytes"]) == 2
    (thread,) = by_kind["thread"]
    assert all(len(took) == 2 and min(took) > 0 for took in thread["us"].values())
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("qwen2.5-0.5b", "Goals", "lookup, memoised", "members"))
    assert (tmp_path / "report.png").stat().st_size > 10_000
    assert transfer.main(["--report", "--out", str(tmp_path)]) == 0
    assert "lookup, memoised" in capsys.readouterr().out


def test_a_ratio_is_taken_within_rounds() -> None:
    seconds = {"bare get": [1.0, 2.0, 9.0], "load": [2.0, 4.0, 18.0]}
    assert transfer_report.ratio(seconds, "bare get", "load") == 0.5


def test_a_goal_is_missed_by_the_slowest_transfer_of_enough_pages() -> None:
    def move(pages: int, load_s: float) -> dict[str, Any]:
        seconds = {"bare get": [1.0], "load": [load_s], "bare put": [1.0], "store": [1.0]}
        return {"kind": "move", "shape": "deepseek-r1", "pages": pages, "seconds": seconds}

    load, store = transfer_report.goals([move(1, 4.0), move(8, 2.0), move(32, 1.0)])
    assert (load.value, load.met) == (0.5, False)
    assert "8 pages" in load.text
    assert "1 of 2" in load.text
    assert store.met


def test_the_cost_of_a_lookup_is_compared_between_the_largest_and_the_smallest_pool() -> None:
    def lookup(stored: int, took_s: float) -> dict[str, Any]:
        seconds = {way: [took_s] for way in ("ours, all there", "bare, all there")}
        return {"kind": "lookup", "stored": stored, "asked": 54, "seconds": seconds}

    ours, bare = transfer_report.goals([lookup(10, 1.0), lookup(1000, 1.5), lookup(100, 9.0)])
    assert (ours.value, ours.met) == (1.5, False)
    assert bare.value == 1.5


def test_what_beliefs_cost_grows_with_their_number() -> None:
    few, many = (keys_worker.beliefs(pages, [10]) for pages in (100, 10_000))
    assert many["bytes"] > 50 * few["bytes"] > 0
    assert many["prefix_10_us"] > 0
