# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""The accuracy test of the original proposal (SGLang PR 14056).

Long prompts, twice over two servers, then after a restart.

E2E_PROMPTS sets their number; 100, as there, if it is not set (CI sends fewer).
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from accuracy.journal import Journal
from accuracy.repeat import Repeat
from accuracy.sending import Sender
from two_instances.cluster import Cluster
from two_instances.run import make_prompts

from .farm import Farm

PROMPTS = int(os.environ.get("E2E_PROMPTS", "100"))
PROMPT_TOKENS = 3500
OUTPUT_TOKENS = 4
MIN_CACHED_SHARE = 0.95


def side_by_side(*jobs: Callable[[], None]) -> None:
    """Several servers work at the same time, a core each."""
    with ThreadPoolExecutor(len(jobs)) as pool:
        for future in [pool.submit(job) for job in jobs]:
            future.result()


@pytest.mark.parametrize("cluster", ["page64"], indirect=True)
def test_long_prompts_answer_the_same_from_both_servers_and_after_a_restart(
    cluster: Cluster,
    farm: Farm,
    dice: random.Random,
    say: Callable[[str], None],
    tmp_path: Path,
) -> None:
    prompts = make_prompts(PROMPTS, PROMPT_TOKENS, seed=dice.randrange(2**32))
    a, b = cluster.servers["A"], cluster.servers["B"]
    pages_before = cluster.pool.stored_pages()
    sender = Sender(None, concurrency=1)
    repeat = Repeat(prompts, OUTPUT_TOKENS, Journal(tmp_path / "answers.jsonl", {}), sender)

    side_by_side(
        lambda: repeat.send("no cache", farm.reference),
        lambda: repeat.send("A", a),
    )
    tiers = repeat.report("no cache").tokens_by_tier
    assert tiers["A"]["storage"] == 0, "the prompts are new"
    pages = PROMPTS * ((PROMPT_TOKENS - 1) // farm.page_size)
    assert cluster.pool.wait_stored(pages_before + pages) >= pages_before + pages
    repeat.send("B", b)
    cluster.restart()
    half = PROMPTS // 2
    side_by_side(
        lambda: repeat.send("B restarted", b, range(half)),
        lambda: repeat.send("A restarted", a, range(half, PROMPTS)),
    )

    report = repeat.report("no cache")
    assert not report.problems, report.problems[:10]
    assert report.identical == 3 * PROMPTS
    assert report.distinct_answers > PROMPTS // 2, "answers that do not tell apart"
    for who, tiers_of in report.tokens_by_tier.items():
        say(f"{who}: {tiers_of}")
        assert tiers_of["host"] == 0
        if who not in ("A", "no cache"):
            assert tiers_of["storage"] >= MIN_CACHED_SHARE * tiers_of["prompt"], who
