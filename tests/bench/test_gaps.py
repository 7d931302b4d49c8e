# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""scripts/bench/gaps: its arithmetic, and a small run. Its figures need a quiet machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench import gaps
from bench.gaps import Gaps, parse


def test_quantiles_are_interpolated_and_given_in_milliseconds() -> None:
    gaps = Gaps("sync", {"idle": [], "device": [0.1, 0.3, 0.2], "pool": [0.4]})
    assert gaps.quantile_ms("device", 0.5) == pytest.approx(200)
    assert gaps.quantile_ms("device", 0.75) == pytest.approx(250)
    assert gaps.quantile_ms("pool", 0.99) == pytest.approx(400)


def test_the_ratio_compares_pool_hits_with_device_hits() -> None:
    gaps = Gaps("sync", {"idle": [9.0], "device": [0.1], "pool": [0.15]})
    assert gaps.ratio(0.99) == pytest.approx(1.5)


def test_an_unknown_mode_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--modes", "async"])
    assert "sync" in capsys.readouterr().err


@pytest.mark.e2e
@pytest.mark.sglang
@pytest.mark.memcache
@pytest.mark.timeout(400)
def test_a_small_run_leaves_the_gaps_of_each_kind(tmp_path: Path) -> None:
    small = ["--size", "tiny", "--prompts", "2", "--prompt-tokens", "700"]
    assert gaps.main(["--modes", "lookahead", *small, "--out", str(tmp_path)]) == 0
    (line,) = map(json.loads, (tmp_path / "gaps.jsonl").read_text().splitlines())
    assert line["mode"] == "lookahead"
    assert all(line["seconds"][kind] for kind in gaps.KINDS_OF_LOAD)
