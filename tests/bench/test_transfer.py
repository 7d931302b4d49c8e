# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""The transfer benchmark measures what it says. No figure is judged here: CI is no place for it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from bench import transfer
from bench.shapes import SHAPES, Pool

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


@pytest.mark.memcache
@pytest.mark.multi
def test_a_run_moves_every_page_each_way_and_leaves_its_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--shapes", "qwen2.5-0.5b", "--pages", "2", "--rounds", "2", "--in-flight", "2"]
    assert transfer.main([*options, "--out", str(tmp_path)]) == 0
    (line,) = map(json.loads, (tmp_path / "transfer.jsonl").read_text().splitlines())
    ways = {"memcpy", "bare put", "store", "bare get", "load", "bare get x2"}
    assert set(line["seconds"]) == ways
    assert all(len(took) == 2 and min(took) > 0 for took in line["seconds"].values())
    assert "qwen2.5-0.5b" in capsys.readouterr().out


def test_a_ratio_is_taken_within_rounds() -> None:
    seconds = {"bare get": [1.0, 2.0, 9.0], "load": [2.0, 4.0, 18.0]}
    assert transfer.ratio(seconds, "bare get", "load") == 0.5
