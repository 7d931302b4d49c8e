# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Options that change how a server uses a real MemCache pool: late attaching, verification, clear.

What holds for every store is in test_attaching_store and test_verified_store.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from ascend_direct.errors import StoreUnavailable
from ascend_direct.store.base import Memory, PageStatus, StoreContext
from tests.contract.conftest import COMMON, NewStore, Pool
from tests.contract.memcache_processes import (
    COMMAND,
    ROOT,
    FixedMetaService,
    PoolMember,
    SharedArena,
    StoreProcess,
)
from tests.contract.store_contract import new_keys
from tests.contract.test_memcache_store import pytestmark  # noqa: F401  the same needs
from tests.waiting import eventually

import ascend_emulation  # isort: skip
import memcache_pool  # isort: skip

OK, MISSING, MISMATCH = PageStatus.OK, PageStatus.MISSING, PageStatus.MISMATCH
LENGTHS = (96, 64)
WAIT_S = 60.0


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(11)


def answers(call: Callable[[], list[PageStatus]]) -> list[PageStatus] | None:
    try:
        return call()
    except StoreUnavailable:
        return None


def test_a_client_that_was_there_before_its_meta_service_attaches_when_it_appears(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    run_dir = ascend_emulation.private_run_dir()
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, run_dir, ignore_errors=True)
        tree = ascend_emulation.build()
        environment = ascend_emulation.environment(tree, run_dir, protocol="host_shm")
        meta = FixedMetaService(environment, memcache_pool.free_ports(3), run_dir)
        stack.callback(meta.kill)
        section = {**COMMON, **meta.section}
        arena = SharedArena(run_dir / "arena")
        store = StoreProcess(environment, section, arena, tmp_path / "log")
        stack.callback(store.kill)
        store.call("wrap", "on_pool_unavailable")
        begin_s = time.monotonic()
        store.open(StoreContext())
        assert time.monotonic() - begin_s < 10, "the native client would block for minutes"
        keys, pages = new_keys(4), arena.place(4, LENGTHS, rng)
        assert answers(lambda: store.exists(keys)) is None

        meta.start()
        eventually(lambda: store.unreachable() == "", WAIT_S, poll_s=0.1)
        member = PoolMember(environment, {**section, "dram_size": "64MB"}, tmp_path / "log")
        stack.callback(member.kill)
        member.joined()
        eventually(lambda: answers(lambda: store.exists(keys)) == [MISSING] * 4, WAIT_S, poll_s=0.1)
        arena.scramble(rng)
        expected = [arena.read(pages, row) for row in range(4)]
        eventually(lambda: answers(lambda: store.put(keys, pages)) == [OK] * 4, WAIT_S, poll_s=0.1)
        arena.bytes[:] = 0
        assert store.get(keys, pages) == [OK] * 4
        assert [arena.read(pages, row) for row in range(4)] == expected
        store.close()


def test_verification_finds_a_page_that_another_put_in_its_place(
    pool: Pool, new_store: NewStore, rng: np.random.Generator
) -> None:
    arena, keys = pool.arena(), new_keys(3)
    plain = new_store(arena)
    verifying = pool.process(arena)
    try:
        verifying.call("wrap", "verify")
        verifying.open(StoreContext())
        pages = arena.place(3, LENGTHS, rng)
        arena.scramble(rng)
        assert verifying.put(keys, pages) == [OK] * 3
        assert verifying.get(keys, pages) == [OK] * 3
        assert plain.get(keys, pages) == [OK] * 3
        plain.call("remove", keys[1])
        arena.scramble(rng)
        assert plain.put(keys, pages) == [OK] * 3  # first write wins: only the middle one is new
        assert verifying.get(keys, pages) == [OK, MISMATCH, OK]
    finally:
        verifying.kill()


def test_verification_reads_device_memory_through_the_ascend_runtime(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    """Under device_sdma the emulation takes every address for device memory."""
    with ExitStack() as stack:
        meta = stack.enter_context(memcache_pool.MetaServiceProcess(protocol="device_sdma"))
        section = {
            "protocol": "device_sdma",
            "dram_size": "1GB",
            "max_dram_size": "1GB",
            "world_size": 8,
            "meta_service_url": meta.meta_service_url,
            "config_store_url": meta.config_store_url,
            "metrics_url": meta.metrics_url,
        }
        arena = SharedArena(meta.run_dir / "arena")
        store = StoreProcess(meta.environment, section, arena, tmp_path / "log")
        stack.callback(store.kill)
        store.call("wrap", "verify")
        store.open(StoreContext(memory=Memory.DEVICE))
        keys, pages = new_keys(2), arena.place(2, LENGTHS, rng)
        arena.scramble(rng)
        expected = [arena.read(pages, row) for row in range(2)]
        assert store.put(keys, pages) == [OK] * 2
        arena.bytes[:] = 0
        assert store.get(keys, pages) == [OK] * 2
        assert [arena.read(pages, row) for row in range(2)] == expected
        store.call("remove", keys[0])
        arena.scramble(rng)
        store.call("put_unverified", keys[:1], *store._moved(pages_of(pages, 1)))
        assert store.get(keys, pages) == [MISMATCH, OK]


def test_a_load_does_not_wait_behind_stores_in_the_native_client(
    pool: Pool, new_store: NewStore
) -> None:
    store = new_store(pool.arena(4 << 20))
    assert store.call("get_within_a_put", new_keys(1)[0], 2 << 20, 30.0)


def test_clear_removes_our_pages_and_servers_that_are_up_store_them_again(
    pool: Pool, new_store: NewStore, rng: np.random.Generator
) -> None:
    arena = pool.arena()
    server, keys, other = new_store(arena), new_keys(3), "another program's"
    namespace = keys[0].split(":")[1]
    pages = arena.place(4, LENGTHS, rng)
    assert server.put([*keys, other], pages) == [OK] * 4
    config = {"store": "memcache", "memcache": {**pool.section, "dram_size": "64MB"}}
    command = [sys.executable, "-m", COMMAND, "pool", "clear", "--config", json.dumps(config)]
    done = subprocess.run(
        [*command, "--namespace", namespace, "--yes", "--json"],
        cwd=ROOT,
        env={**os.environ, **pool.meta.environment},
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert (done.returncode, done.stderr.count("Traceback")) == (0, 0), done.stderr
    event = json.loads(done.stdout)
    assert event["removed"] == 1, "new_keys have a namespace each"
    assert server.get([*keys, other], pages) == [MISSING, OK, OK, OK]
    assert server.put(keys, pages_of(pages, 3)) == [OK] * 3
    assert server.exists(keys) == [OK] * 3

    config["memcache"]["meta_service_url"] = "tcp://127.0.0.1:9"
    command[-1] = json.dumps(config)
    away = subprocess.run(
        [*command, "--yes"],
        cwd=ROOT,
        env={**os.environ, **pool.meta.environment},
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert (away.returncode, away.stdout) == (3, "")
    assert "nobody listens at tcp://127.0.0.1:9" in away.stderr


def pages_of(pages, count: int):
    return type(pages)(pages.addresses[:count], pages.lengths_bytes)
