# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Concurrent requests at every page size, prefill chunked or not, with and without overlap, loads
in step with the scheduler or ahead of it.

`farm.SETUPS` says which combination a name stands for.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from sglang_cpu.client import Generation, SGLangClient
from two_instances.cluster import Cluster

from .farm import SETUPS, Farm, tokens_by_tier

CONCURRENCY = 16
OUTPUT_TOKENS = 8
# A pool hit shorter than this is recomputed: config.min_load_tokens.
MIN_LOAD_TOKENS = 128


def mixed_prompts(dice: random.Random) -> list[list[int]]:
    """Four families of four that share a prefix of 600 tokens, and eight that share nothing."""

    def some(count: int) -> list[int]:
        return [dice.randint(3, 1000) for _ in range(count)]

    families = [some(600) for _ in range(4)]
    prompts = [family + some(dice.randint(60, 400)) for family in families for _ in range(4)]
    prompts += [some(dice.randint(300, 900)) for _ in range(8)]
    dice.shuffle(prompts)
    return prompts


def distinct_pages(prompts: Sequence[Sequence[int]], page_size: int) -> int:
    """Full pages of all prompts; one that two prompts share counts once."""
    return len(
        {
            hash(tuple(prompt[:end]))
            for prompt in prompts
            for end in range(page_size, len(prompt) + 1, page_size)
        }
    )


def send(server: SGLangClient, prompts: Sequence[Sequence[int]]) -> list[Generation]:
    return server.generate_many(
        prompts, CONCURRENCY, OUTPUT_TOKENS, return_cached_tokens_details=True
    )


def assert_same(answers: Sequence[Generation], truth: Sequence[Generation], who: str) -> None:
    wrong = [
        number
        for number, (got, right) in enumerate(zip(answers, truth, strict=True))
        if got.output_ids != right.output_ids
    ]
    assert not wrong, f"{who}: answers {wrong} differ from those without a cache"


def assert_all_cached(answers: Sequence[Generation], page_size: int, who: str) -> None:
    """All but what the last page and the minimum-benefit rule leave out came from a cache."""
    for answer in answers:
        least = answer.prompt_tokens - page_size - MIN_LOAD_TOKENS
        assert answer.cached_tokens >= least, (
            f"{who}: {answer.cached_tokens} of {answer.prompt_tokens} tokens cached"
        )


@pytest.mark.parametrize("cluster", list(SETUPS), indirect=True)
def test_concurrent_shared_and_disjoint_prompts_answer_as_without_a_cache(
    cluster: Cluster, farm: Farm, dice: random.Random
) -> None:
    prompts = mixed_prompts(dice)
    a, b = cluster.servers["A"], cluster.servers["B"]
    truth = send(farm.reference, prompts)
    pages_before = cluster.pool.stored_pages()

    first = send(a, prompts)
    assert_same(first, truth, "A")
    assert tokens_by_tier(first)["storage"] == 0, "the prompts are new"
    pages = pages_before + distinct_pages(prompts, farm.page_size)
    assert cluster.pool.wait_stored(pages) >= pages
    a.flush()

    second = send(b, prompts)
    assert_same(second, truth, "B")
    tiers = tokens_by_tier(second)
    assert tiers["host"] == 0
    assert tiers["storage"] > tiers["device"], f"B took most from the pool: {tiers}"
    assert_all_cached(second, farm.page_size, "B")

    third = send(a, prompts)
    assert_same(third, truth, "A after a flush")
    assert tokens_by_tier(third)["storage"] > 0
    assert_all_cached(third, farm.page_size, "A after a flush")
