# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Servers that tests share: one pair at a time, and one server without a cache.

Owns the configurations, which servers are up, and what "at rest" means. Three servers are the most
that run: two cores and one budget of minutes for the whole suite.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sglang_cpu.client import Generation
from sglang_cpu.server import SGLangServer
from two_instances.cluster import Cluster, MemcachePool, Pool

from .faults import FaultyPool

START_TIMEOUT_S = 400.0
REST_TIMEOUT_S = 40.0
# 100 prompts of 3.5k tokens are 0.72 GB of the tiny model's KV.
POOL_SIZE = "2GB"

# SGLang's own checks, as strict as they get; a violation ends the scheduler.
CHECKS = {
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1",
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
    "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
    "SGLANG_ENABLE_TREE_CACHE_SANITY_CHECK": "1",
    "SGLANG_INVARIANT_CHECK": "2",
}
ALARM = re.compile(r"leak|Traceback|hit an exception|double free|use-after-free", re.IGNORECASE)


@dataclass(frozen=True)
class Setup:
    """One configuration of a pair of servers."""

    page_size: int
    make_pool: Callable[[Path], Pool]
    arguments: tuple[str, ...] = ()
    direct: dict[str, Any] = field(default_factory=dict)


def _memcache(_folder: Path) -> Pool:
    return MemcachePool(member_size=POOL_SIZE)


_CHUNKED = ("--chunked-prefill-size", "512")
_NO_OVERLAP = ("--disable-overlap-schedule",)
SETUPS = {
    # What an operator gets; on a loaded machine a lookup may take longer than in production.
    "page64": Setup(
        64,
        _memcache,
        ("--enable-metrics",),
        {"lookup_timeout_ms": 2_000, "load_timeout_ms": 20_000},
    ),
    "faults": Setup(
        16,
        FaultyPool,
        _NO_OVERLAP,
        {"load_timeout_ms": 2_500, "store_timeout_ms": 3_000},
    ),
    "page1": Setup(
        1,
        _memcache,
        (*_CHUNKED, *_NO_OVERLAP),
        {"lookup_timeout_ms": 2_000, "load_timeout_ms": 20_000},
    ),
    "page128": Setup(
        128,
        _memcache,
        _CHUNKED,
        {"lookup_timeout_ms": 2_000, "load_timeout_ms": 20_000, "load_mode": "lookahead"},
    ),
}


class Farm:
    """Starts what a test asks for and ends what it does not need.

    Args:
        folder: for logs and provider files.
        say: takes progress lines.
    """

    def __init__(self, model: Path, folder: Path, say: Callable[[str], None]) -> None:
        self.model = model
        self._folder = folder
        self._say = say
        self._name = ""
        self._cluster: Cluster | None = None
        self._reference = SGLangServer(
            model,
            ["--disable-radix-cache"],
            name="no cache",
            log_path=folder / "no_cache.log",
            start_timeout_s=START_TIMEOUT_S,
            progress=say,
        )

    def cluster(self, name: str) -> Cluster:
        """The pair of this configuration, started unless it is the one that is up."""
        if self._cluster is not None and self._name == name and self._all_running():
            return self._cluster
        self._close_cluster()
        setup = SETUPS[name]
        is_new = not self._reference.is_running
        if is_new:  # side by side with the pair
            self._reference.start()
        cluster = Cluster(
            setup.make_pool(self._folder / name),
            self.model,
            ["--page-size", str(setup.page_size), *setup.arguments],
            direct=setup.direct,
            reference=False,
            log_dir=self._folder / name,
            progress=self._say,
        )
        self._cluster, self._name = cluster.__enter__(), name
        if is_new:
            self._reference.wait_ready()
        return self._cluster

    def _all_running(self) -> bool:
        assert self._cluster is not None
        return all(server.is_running for server in self._cluster.servers.values())

    @property
    def page_size(self) -> int:
        """Of the pair that is up."""
        return SETUPS[self._name].page_size

    @property
    def reference(self) -> SGLangServer:
        """A server that caches nothing: it says what is right."""
        if not self._reference.is_running:
            self._reference.start()
            self._reference.wait_ready()
        return self._reference

    def clear(self) -> None:
        """End everything, for tests that start servers of their own."""
        self._close_cluster()
        self._reference.stop()

    def _close_cluster(self) -> None:
        cluster, self._cluster = self._cluster, None
        if cluster is not None:
            cluster.__exit__(None, None, None)


def used_tokens(server: SGLangServer) -> int:
    """KV slots that are neither free nor evictable: those of requests, pins, withheld slots."""
    loads = json.loads(server.get_text("/v1/loads"))["loads"]
    return sum(load["num_used_tokens"] for load in loads)


class Watch:
    """From here on, nothing alarming is logged, and in the end every slot is free or evictable."""

    def __init__(self, servers: Sequence[SGLangServer]) -> None:
        self._servers = servers
        self._from = {s.name: s.log_path.stat().st_size for s in servers}

    def log(self, server: SGLangServer) -> str:
        """What a server has logged since."""
        with server.log_path.open("rb") as log:
            log.seek(self._from[server.name])
            return log.read().decode(errors="replace")

    def check(self, timeout_s: float = REST_TIMEOUT_S) -> None:
        """Wait for rest, then assert it."""
        with ThreadPoolExecutor() as pool:
            tokens = pool.map(lambda server: used_at_rest(server, timeout_s), self._servers)
            used = dict(zip(self._servers, tokens, strict=True))
        for server, tokens in used.items():
            alarms = [line for line in self.log(server).splitlines() if ALARM.search(line)]
            assert not alarms, f"{server.name}: {alarms[:5]} in {server.log_path}"
            assert server.is_running, f"{server.name} has ended: {server.log_path}"
            assert tokens == 0, f"{server.name}: {tokens} tokens are still pinned or withheld"


def used_at_rest(server: SGLangServer, timeout_s: float = REST_TIMEOUT_S) -> int:
    """Used tokens once there are none, or what is stuck after `timeout_s`."""
    deadline_s = time.monotonic() + timeout_s
    while server.is_running:
        server.is_healthy()  # a request: an idle scheduler sleeps and would not collect results
        tokens = used_tokens(server)
        if not tokens or time.monotonic() > deadline_s:
            return tokens
        time.sleep(0.3)
    return 0


def tokens_by_tier(answers: Sequence[Generation]) -> dict[str, int]:
    """Prompt tokens of all answers, by where their KV came from."""
    tiers = {"prompt": sum(answer.prompt_tokens for answer in answers)}
    for tier in ("device", "host", "storage"):
        tiers[tier] = sum(answer.cached_tokens_details.get(tier, 0) for answer in answers)
    return tiers
