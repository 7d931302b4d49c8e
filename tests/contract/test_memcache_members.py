# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Members of a MemCache pool that die. Each test has a pool of its own: MetaService may take a
minute to get over a killed member, and whoever uses the pool meanwhile suffers with it."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pytest

from ascend_direct.store.base import PageStatus
from tests.contract.conftest import NewStore, Pool, running_pool
from tests.contract.store_contract import new_keys

import ascend_emulation  # isort: skip

pytestmark = [
    pytest.mark.memcache,
    pytest.mark.multi,
    pytest.mark.skipif(
        ascend_emulation.real_driver_present() is not None,
        reason="the emulation refuses to start where an Ascend driver is present",
    ),
]

OK, MISSING, FULL = PageStatus.OK, PageStatus.MISSING, PageStatus.FULL
LENGTHS = (96, 64)
# MetaService tells the members about their pages a little after a put; a member killed while it
# does can hold it up for a minute.
SETTLE_S = 3.0
MISSED_S = 120.0


@pytest.fixture
def pool() -> Iterator[Pool]:
    with running_pool() as pool:
        yield pool


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(11)


def test_pages_go_with_the_member_that_holds_them(
    pool: Pool, new_store: NewStore, rng: np.random.Generator
) -> None:
    arena, keys = pool.arena(), new_keys(1)
    owner = new_store(arena, dram_size="64MB")
    client = new_store(arena, preferred_members=[str(owner.member_id)])
    assert client.put(keys, arena.place(1, LENGTHS, rng)) == [OK]
    assert client.exists(keys) == [OK]
    time.sleep(SETTLE_S)
    owner.kill()
    deadline = time.monotonic() + MISSED_S
    while client.exists(keys) == [OK] and time.monotonic() < deadline:
        time.sleep(0.2)
    assert client.exists(keys) == [MISSING]
    assert client.put(new_keys(1), arena.place(1, LENGTHS, rng)) == [FULL], "the only choice died"


def test_with_two_replicas_a_page_survives_its_first_holder(
    pool: Pool, new_store: NewStore, rng: np.random.Generator
) -> None:
    arena, keys = pool.arena(), new_keys(4)
    second = new_store(arena, dram_size="64MB")
    client = new_store(arena, replicas=2)
    pages = arena.place(4, LENGTHS, rng)
    arena.scramble(rng)
    expected = [arena.read(pages, row) for row in range(4)]
    assert client.put(keys, pages) == [OK] * 4
    time.sleep(SETTLE_S)
    second.kill()
    deadline = time.monotonic() + MISSED_S
    probe = arena.place(1, LENGTHS, rng)
    while client.put(new_keys(1), probe) != [FULL]:
        assert time.monotonic() < deadline, "one member is left: two replicas have no room"
        time.sleep(0.5)
    arena.bytes[:] = 0
    assert client.get(keys, pages) == [OK] * 4
    assert [arena.read(pages, row) for row in range(4)] == expected
