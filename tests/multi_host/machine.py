# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""What runs on one host of a pool: a member that gives DRAM, and a client like a server's rank.

Owns their life and the client's KV memory, which is laid out like a KV pool. The engine that bounds
the client's calls runs in the test; the native calls it waits for are made on the host. Hosts share
no directory with each other: what one can see of another comes over the network.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ascend_direct.device import PASSED, Device
from ascend_direct.errors import StoreUnavailable
from ascend_direct.metrics import Metrics
from ascend_direct.page_layout import PageLayout, Span
from ascend_direct.store.base import StoreContext
from ascend_direct.transfer.engine import LoadOutcome, TransferEngine, TransferLimits
from ascend_direct.transfer.store_queue import StoreJob
from tests.contract.memcache_processes import (
    ROOT,
    FixedMetaService,
    PoolMember,
    SharedArena,
    StoreProcess,
)
from tests.multi_host.hosts import Host

sys.path.insert(0, str(ROOT / "scripts"))

import ascend_emulation

META_PORTS = (5000, 6000, 8000)
MEMBER_PORT, CLIENT_PORT = 7000, 7100  # a process takes some ports after its own, too
DRAM_SIZE = "32MB"
LAYERS, PAGES, SPAN_BYTES = 2, 16, 4096
PARTS = ("k", "v")
STORE_TIMEOUT_S = 60.0
LET_IN_S = 240.0  # MetaService may try each dead process for 30 s, several times
Joined = TypeVar("Joined")
# As a server has them, but for a machine whose two cores run everything.
LIMITS = TransferLimits(
    lookup_timeout_s=2.0,
    load_timeout_s=2.0,
    store_timeout_s=STORE_TIMEOUT_S,
    store_queue_bytes=1 << 26,
    batch_bytes=1 << 26,
)


def host_environment(folder: Path) -> dict[str, str]:
    """Variables of a host's processes; `folder` is its own /dev/shm, so to speak."""
    folder.mkdir(exist_ok=True)
    tree = ascend_emulation.build()
    return ascend_emulation.environment(tree, folder, protocol="host_tcp")


def meta_service(host: Host, folder: Path) -> FixedMetaService:
    """A MetaService at its usual ports on a host of its own."""
    environment = host_environment(folder)
    return FixedMetaService(environment, META_PORTS, folder, host.address, host.prefix)


class Machine:
    """One host with its two processes, between `start` and `power_off`.

    Args:
        folder: of this host alone.
        pool: section ``memcache`` that all hosts share.
    """

    def __init__(self, host: Host, folder: Path, pool: Mapping[str, Any]) -> None:
        self.host = host
        self._environment = host_environment(folder)
        self._pool = {"protocol": "host_tcp", "max_dram_size": DRAM_SIZE, "world_size": 16, **pool}
        self._log = folder / "processes.log"
        self.arena = SharedArena(folder / "kv", LAYERS * len(PARTS) * PAGES * SPAN_BYTES)
        self._running: list[PoolMember | StoreProcess] = []

    def start(self) -> None:
        """Both processes join; returns when they are linked with all others.

        A process that gives up is started again, as an init system does: MetaService lets nobody in
        while it waits for one that has died.
        """
        self.member_id = str(self._until_let_in(self._join_member)["member_id"])
        self._until_let_in(self._join_client)
        self.engine = TransferEngine(
            self.client, self._layout(), Device("cpu"), LIMITS, Metrics(), lambda keys: None
        )
        self.engine.start()

    def _until_let_in(self, join: Callable[[], Joined]) -> Joined:
        deadline_s = time.monotonic() + LET_IN_S
        while True:
            try:
                return join()
            except StoreUnavailable:
                self._running.pop().kill()
                if time.monotonic() > deadline_s:
                    raise

    def _join_member(self) -> dict[str, Any]:
        giving = {**self._section(MEMBER_PORT), "dram_size": DRAM_SIZE}
        member = PoolMember(self._environment, giving, self._log, self.host.prefix)
        self._running.append(member)
        return member.joined()

    def _join_client(self) -> None:
        taking = {**self._section(CLIENT_PORT), "preferred_members": [self.member_id]}
        self.client = StoreProcess(
            self._environment, taking, self.arena, self._log, self.host.prefix
        )
        self._running.append(self.client)
        self.client.open(StoreContext())

    def power_off(self) -> None:
        """Both processes end at once, as with the power; the cable stays as it is."""
        while self._running:
            self._running.pop().kill()

    def fill(self, rng: np.random.Generator) -> None:
        """New bytes in all of the client's KV memory."""
        self.arena.bytes[:] = np.frombuffer(rng.bytes(len(self.arena.bytes)), np.uint8)

    def pages(self, numbers: Sequence[int]) -> list[bytes]:
        """What pages of the client's KV memory hold."""
        kv = self.arena.bytes.reshape(LAYERS * len(PARTS), PAGES, SPAN_BYTES)
        return [kv[:, number].tobytes() for number in numbers]

    def store(self, keys: Sequence[str], numbers: Sequence[int]) -> bool:
        """Write pages back, on this host's own member; whether all are in the pool now."""
        places = np.array(numbers)
        job = StoreJob(list(keys), lambda: places, PASSED, 0)
        self.engine.stores.submit(job)
        assert job.returned.wait(STORE_TIMEOUT_S), "a store hangs"
        return self.engine.stores.pop()

    def load(self, keys: Sequence[str], numbers: Sequence[int]) -> LoadOutcome:
        """Read pages into place, as a request does: waits for the engine's deadline at most."""
        places = np.array(numbers)
        return self.engine.load(list(keys), lambda: places, PASSED)

    def _section(self, port: int) -> dict[str, Any]:
        return {**self._pool, "hcom_url": f"tcp://{self.host.address}:{port}"}

    def _layout(self) -> PageLayout:
        base, run = self.arena.address, PAGES * SPAN_BYTES
        names = [(layer, part) for layer in range(LAYERS) for part in PARTS]
        spans = [
            Span(layer, part, base + number * run, SPAN_BYTES, SPAN_BYTES)
            for number, (layer, part) in enumerate(names)
        ]
        return PageLayout(tuple(spans), PAGES, page_size_tokens=16, tag="test")
