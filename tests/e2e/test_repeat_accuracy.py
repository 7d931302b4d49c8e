# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""The original proposal's accuracy test: long prompts, twice over two servers, then after restart.

E2E_PROMPTS sets their number; 100, the proposal's, is the default everywhere.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
from sglang_cpu.client import Generation, SGLangClient
from two_instances.cluster import Cluster
from two_instances.run import ask, make_prompts

from .farm import Farm, tokens_by_tier

PROMPTS = int(os.environ.get("E2E_PROMPTS", "100"))
PROMPT_TOKENS = 3500
OUTPUT_TOKENS = 4
MIN_CACHED_SHARE = 0.95

Say = Callable[[str], None]
Prompts = Sequence[Sequence[int]]


def send_all(who: str, server: SGLangClient, prompts: Prompts, say: Say) -> list[Generation]:
    """Answers in order; a line every ten prompts."""
    answers: list[Generation] = []
    begin_s = time.monotonic()
    for prompt in prompts:
        answers.append(ask(server, prompt, OUTPUT_TOKENS))
        if not len(answers) % 10:
            tiers = tokens_by_tier(answers)
            say(
                f"{who}: {len(answers)}/{len(prompts)} prompts, {time.monotonic() - begin_s:.0f} s,"
                f" {tiers['storage']} tokens from storage, {tiers['device']} from device"
            )
    return answers


def output_ids(answers: Sequence[Generation]) -> list[list[int]]:
    return [answer.output_ids for answer in answers]


def side_by_side(*jobs: tuple[str, SGLangClient, Prompts], say: Say) -> list[list[Generation]]:
    """Several servers work at the same time, a core each."""
    with ThreadPoolExecutor(len(jobs)) as pool:
        futures = [pool.submit(send_all, *job, say) for job in jobs]
        return [future.result() for future in futures]


@pytest.mark.parametrize("cluster", ["page64"], indirect=True)
def test_long_prompts_answer_the_same_from_both_servers_and_after_a_restart(
    cluster: Cluster, farm: Farm, dice: random.Random, say: Say
) -> None:
    prompts = make_prompts(PROMPTS, PROMPT_TOKENS, seed=dice.randrange(2**32))
    a, b = cluster.servers["A"], cluster.servers["B"]
    pages_before = cluster.pool.stored_pages()

    right, first = side_by_side(("no cache", farm.reference, prompts), ("A", a, prompts), say=say)
    assert tokens_by_tier(first)["storage"] == 0, "the prompts are new"
    pages = PROMPTS * ((PROMPT_TOKENS - 1) // farm.page_size)
    assert cluster.wait_stored(pages_before + pages) >= pages_before + pages
    second = send_all("B", b, prompts, say)
    cluster.restart()
    half = PROMPTS // 2
    by_b, by_a = side_by_side(
        ("B restarted", b, prompts[:half]), ("A restarted", a, prompts[half:]), say=say
    )

    truth = output_ids(right)
    assert len({tuple(ids) for ids in truth}) > PROMPTS // 2, "answers that do not tell apart"
    for who, answers in {"A": first, "B": second, "restarted": by_b + by_a}.items():
        wrong = [i for i, ids in enumerate(output_ids(answers)) if ids != truth[i]]
        assert not wrong, f"{who}: {len(wrong)} of {PROMPTS} answers differ, prompts {wrong[:10]}"
        tiers = tokens_by_tier(answers)
        say(f"{who}: {tiers}")
        assert tiers["host"] == 0
        if who != "A":
            assert tiers["storage"] >= MIN_CACHED_SHARE * tiers["prompt"], f"{who}: {tiers}"
