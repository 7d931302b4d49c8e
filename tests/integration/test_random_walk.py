# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Two instances, one pool, everything at random: after each step bytes and slots are right."""

from __future__ import annotations

import random
import time

import pytest

from .audit import audit, check_at_rest, check_pool
from .prompts import counts
from .walk import WALK_CONFIG, Walk

CASES = [
    ("gqa", 16, "rust", 1_500),
    ("mla", 16, "python", 1_500),
    ("gqa_narrow_v", 1, "rust", 500),  # a page per token: each step costs more
]


# What must have happened, and how often.
EVENTS = {
    "loads": 10,
    "loads_failed": 3,
    "loads_late": 3,
    "stores": 50,
    "store_failed_pages": 3,
    "stores_given_up": 3,
}
GIVEN_UP = ("stores_dropped_deadline", "stores_dropped_queue_full", "stores_late")


def totals(instances) -> dict[str, int]:
    """Counters of all instances together."""
    every = {name: sum(counts(i)[name] for i in instances) for name in counts(instances[0])}
    return {**every, "stores_given_up": sum(every[name] for name in GIVEN_UP)}


def missing(instances) -> dict[str, int]:
    """Events that have not happened often enough yet."""
    total = totals(instances)
    return {name: total[name] for name, least in EVENTS.items() if total[name] < least}


@pytest.mark.parametrize(("kind", "page_size", "core", "steps"), CASES)
def test_a_random_walk_keeps_every_promise(make, kind, page_size, core, steps) -> None:
    seed = f"{kind} {page_size} {core}"
    instances = [
        make(kind=kind, page_size=page_size, core=core, tokens=800, config=WALK_CONFIG)
        for _ in range(2)
    ]
    walk = Walk(instances, random.Random(seed), random.Random(f"chaos {seed}"))
    begin = time.monotonic()
    for step in range(4 * steps):  # how often the clock lets things go wrong is not in the seed
        if step >= steps and not missing(instances):
            break
        action = "?"
        try:
            action = walk.step()
            for instance in instances:
                audit(instance)
            if step % 50 == 0:
                check_pool(instances[0])
        except BaseException:
            print(f"step {step} ({action}) of walk {seed!r}; so far {dict(walk.done)}")
            raise
    walk.finish()
    for instance in instances:
        check_at_rest(instance)
    print(f"{time.monotonic() - begin:.1f} s, {dict(walk.done)}, {totals(instances)}")
    assert not missing(instances), "a walk in which nothing happened proves nothing"
