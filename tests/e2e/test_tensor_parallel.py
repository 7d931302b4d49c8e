# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Servers with two ranks each: same answers, no wire traffic twice, pages shared across TP sizes.

E2E_TP_PROMPTS sets the number of prompts; 100 if it is not set (CI sends fewer).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sglang_cpu.client import Generation
from sglang_cpu.models import make_model
from sglang_cpu.server import SGLangServer
from two_instances.cluster import Cluster, MemcachePool
from two_instances.run import ask, make_prompts

from .farm import CHECKS, Farm, tokens_by_tier

PROMPTS = int(os.environ.get("E2E_TP_PROMPTS", "100"))
PROMPT_TOKENS, PAGE_SIZE, OUTPUT_TOKENS = 500, 64, 4
PAGES = (PROMPT_TOKENS - 1) // PAGE_SIZE
CLOSING = re.compile(
    r"TP(\d)\] ascend_direct: pool: \d+ loads \((\d+) pages, .*?, \d+ stores \((\d+) pages"
    r".*closed in"
)
STRICT = {**CHECKS, "SGLANG_ENABLE_RANK_CONSENSUS_CHECKER": "1"}

Say = Callable[[str], None]


@contextmanager
def servers(
    folder: Path, kind: str, say: Say, tp_sizes: dict[str, int], **direct: Any
) -> Iterator[Cluster]:
    patience = {"lookup_timeout_ms": 5_000, "load_timeout_ms": 30_000, "log_interval_s": 0}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in STRICT.items():
            patch.setenv(name, value)
        with Cluster(
            MemcachePool(member_size="1GB"),
            make_model(folder / kind, kind),
            ["--page-size", str(PAGE_SIZE)],
            servers=tp_sizes,
            direct={**patience, **direct},
            log_dir=folder / f"{kind}-logs",
            progress=say,
        ) as cluster:
            yield cluster


def ask_all(server: SGLangServer, prompts: list[list[int]], say: Say) -> list[Generation]:
    answers = []
    for number, prompt in enumerate(prompts, 1):
        answers.append(ask(server, prompt, OUTPUT_TOKENS))
        if not number % 20:
            say(f"{server.name}: {number}/{len(prompts)} {tokens_by_tier(answers)}")
    return answers


def moved_pages(server: SGLangServer) -> dict[int, tuple[int, int]]:
    """Rank → (pages read, pages written), from what each rank logs when it closes."""
    server.stop()
    found = CLOSING.findall(server.log_text())
    return {int(rank): (int(loaded), int(stored)) for rank, loaded, stored in found}


@pytest.mark.parametrize("kind", ["gqa", "mla"])
def test_two_rank_servers_share_a_pool_and_answer_like_one_rank_without_a_cache(
    kind: str, farm: Farm, tmp_path: Path, say: Say
) -> None:
    farm.clear()
    prompts = make_prompts(PROMPTS, PROMPT_TOKENS, seed=31)
    ways = {"replica_read": "sharded"} if kind == "mla" else {}
    with servers(tmp_path, kind, say, {"A": 2, "B": 2}, **ways) as cluster:
        truth = [a.output_ids for a in ask_all(cluster.servers["no cache"], prompts, say)]
        first = ask_all(cluster.servers["A"], prompts, say)
        ranks = 1 if kind == "mla" else 2
        cluster.pool.wait_stored(PROMPTS * PAGES * ranks)
        second = ask_all(cluster.servers["B"], prompts, say)
        assert [a.output_ids for a in first] == truth
        assert [a.output_ids for a in second] == truth
        tiers = tokens_by_tier(second)
        assert tiers["storage"] == PROMPTS * PAGES * PAGE_SIZE, tiers
        written = moved_pages(cluster.servers["A"])
        read = moved_pages(cluster.servers["B"])
    say(f"{kind}: written by A {written}, read by B {read}")
    loads = [read[rank][0] for rank in (0, 1)]
    stores = [written[rank][1] for rank in (0, 1)]
    if kind == "gqa":  # each rank holds its own heads of each page
        assert loads == stores == [PROMPTS * PAGES] * 2
        return
    assert sum(loads) == sum(stores) == PROMPTS * PAGES
    assert abs(stores[0] - stores[1]) <= 1
    assert abs(loads[0] - loads[1]) <= 1


def test_a_server_with_one_rank_finds_what_two_ranks_wrote_and_back(
    farm: Farm, tmp_path: Path, say: Say
) -> None:
    farm.clear()
    prompts = make_prompts(8, PROMPT_TOKENS, seed=32)
    with servers(tmp_path, "gqa", say, {"two": 2, "one": 1}, heads_per_object=1) as cluster:
        truth = [a.output_ids for a in ask_all(cluster.servers["no cache"], prompts, say)]
        for number, (writer, reader) in enumerate([("two", "one"), ("one", "two")]):
            mine = slice(number * 4, number * 4 + 4)
            first = ask_all(cluster.servers[writer], prompts[mine], say)
            cluster.pool.wait_stored((number + 1) * 4 * PAGES * 2)
            second = ask_all(cluster.servers[reader], prompts[mine], say)
            assert [a.output_ids for a in first] == truth[mine]
            assert [a.output_ids for a in second] == truth[mine]
            assert tokens_by_tier(second)["storage"] == 4 * PAGES * PAGE_SIZE
