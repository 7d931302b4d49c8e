# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""One MemCache pool for the whole session: a MetaService and a member that gives the memory.

The stores under test are pure clients beside it, so that pages outlive them.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ascend_direct.store.base import StoreContext
from tests.contract.memcache_processes import ROOT, PoolMember, SharedArena, StoreProcess

sys.path.insert(0, str(ROOT / "scripts"))

import memcache_pool

MEMBER_SIZE = "128MB"
COMMON = {"protocol": "host_shm", "max_dram_size": "256MB", "world_size": 32}


@dataclass
class Pool:
    """A running pool and what a process needs to join it."""

    meta: memcache_pool.MetaServiceProcess
    member: PoolMember
    joined: dict[str, Any]
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    @property
    def section(self) -> dict[str, Any]:
        return {
            **COMMON,
            "meta_service_url": self.meta.meta_service_url,
            "config_store_url": self.meta.config_store_url,
            "metrics_url": self.meta.metrics_url,
        }

    def arena(self, size_bytes: int = 1 << 20) -> SharedArena:
        return SharedArena(self.run_dir / f"arena{next(self._numbers)}", size_bytes)

    def process(self, arena: SharedArena, **options: Any) -> StoreProcess:
        """A store's process, not yet joined; it ends by `kill`."""
        section = {**self.section, **options}
        return StoreProcess(self.meta.environment, section, arena, self.log_path)

    @property
    def run_dir(self) -> Path:
        return self.meta.run_dir

    @property
    def log_path(self) -> Path:
        return self.run_dir / "processes.log"


@contextmanager
def running_pool() -> Iterator[Pool]:
    """A MetaService and the member that gives the memory, until the block ends."""
    with memcache_pool.MetaServiceProcess(protocol="host_shm") as meta:
        section = {
            **COMMON,
            "meta_service_url": meta.meta_service_url,
            "config_store_url": meta.config_store_url,
            "metrics_url": meta.metrics_url,
            "dram_size": MEMBER_SIZE,
        }
        member = PoolMember(meta.environment, section, meta.run_dir / "member.log")
        try:
            yield Pool(meta, member, member.joined())
        finally:
            member.kill()


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    with running_pool() as pool:
        yield pool


NewStore = Callable[..., StoreProcess]


@pytest.fixture
def new_store(pool: Pool) -> Iterator[NewStore]:
    """Makes stores in processes of their own, joined; all end with the test."""
    with ExitStack() as stack:

        def make(arena: SharedArena, context: StoreContext | None = None, **options: Any) -> Any:
            process = pool.process(arena, **options)
            stack.callback(process.kill)
            process.open(context or StoreContext())
            return process

        yield make
