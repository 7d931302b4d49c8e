# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""The demonstration proves what it says: it passes on a sound pool and fails on a broken one."""

from __future__ import annotations

import functools
import json
import os
import random
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from two_instances import __main__ as demo
from two_instances.cluster import Cluster
from two_instances.run import make_prompts

from .farm import Farm
from .test_aborts import pool_of

ROOT = Path(__file__).resolve().parents[2]
DEMO_TIMEOUT_S = 600


def run(program: str, *options: str, out: Path) -> dict[str, Any]:
    """What a demonstration that passes has left in its JSON."""
    done = subprocess.run(
        [sys.executable, "-m", program, "--size", "tiny", *options, "--out", str(out)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "scripts")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=DEMO_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert "PASSED" in done.stdout
    assert (out / "result.png").read_bytes().startswith(b"\x89PNG")
    result: dict[str, Any] = json.loads((out / "result.json").read_text())
    assert result["ok"]
    return result


@pytest.mark.usefixtures("no_servers")
def test_the_demo_passes_and_leaves_its_table_json_and_picture(tmp_path: Path) -> None:
    result = run("two_instances", "--store", "local", "--prompts", "1", out=tmp_path)
    assert {answer["phase"] for answer in result["answers"]} >= {"no cache", "B (pool hit)"}


@pytest.mark.memcache
@pytest.mark.pd
@pytest.mark.usefixtures("no_servers")
def test_the_demo_of_decode_offload_finds_what_was_generated_in_the_pool(tmp_path: Path) -> None:
    talk = ("--conversations", "1", "--turns", "2", "--question-tokens", "32")
    result = run("prefill_decode", *talk, "--answer-tokens", "160", out=tmp_path)
    linked = [turn for turn in result["turns"] if turn["node"] == "with offload"]
    assert [turn["pool_tokens"] > 0 for turn in linked] == [False, True]


@pytest.mark.parametrize("cluster", ["faults"], indirect=True)
@pytest.mark.parametrize(
    ("mode", "problem"),
    [("negate", "without a cache"), ("missing", "of the prompt tokens came from the pool")],
)
def test_the_demo_fails_on_wrong_bytes_and_when_b_did_not_load(
    cluster: Cluster,
    farm: Farm,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    dice: random.Random,
    mode: str,
    problem: str,
) -> None:
    def running(*_: Any, **__: Any) -> Any:
        return nullcontext(cluster)

    options = ["--size", "tiny", "--prompts", "1", "--page-size", str(farm.page_size)]
    arguments = [*options, "--store", "local", "--prompt-tokens", "1700", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["demo", *arguments])
    monkeypatch.setattr(demo, "Cluster", running)
    fresh = functools.partial(make_prompts, seed=dice.randrange(2**32))
    monkeypatch.setattr(demo, "make_prompts", fresh)
    monkeypatch.setitem(cluster.servers, "no cache", farm.reference)

    with pool_of(cluster).faults.on("get", mode):
        assert demo.main() == 1
    result = json.loads((tmp_path / "result.json").read_text())
    assert not result["ok"]
    assert any(problem in line for line in result["problems"]), result["problems"]
    for server in cluster.servers.values():  # negated pages were loaded: none may stay
        server.flush()
