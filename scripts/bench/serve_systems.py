# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""The systems that scripts/bench/serve compares: what each is, and how its servers are started.

A system is a row of SYSTEMS. One that shares its cache between servers has a pool of its own, of
the same size as every other's. Servers are sglang_cpu.server's, pools serve_pools'.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_cpu.server import LAUNCHER, SGLangServer
from two_instances.cluster import Progress, linked_args

from bench.serve_pools import MemcacheServePool, MooncakePool, ServePool

SCRIPTS = Path(__file__).resolve().parents[1]
HICACHE_LAUNCHER = (sys.executable, "-W", "ignore", "-m", "bench.hicache_server")


@dataclass(frozen=True)
class System:
    """One row of the comparison.

    Attributes:
        title: what it is, for the report.
        arguments: SGLang options, given what the pool's `options` say ({} without a pool).
        pool: what its two servers share; None: one server, which has nobody to share with.
        plugins: value of SGLANG_PLUGINS.
        reuses: False where nothing is ever cached.
        splits_kv: a page's K and V are two objects in the pool, where the model has both.
        by_default: measured when nobody names systems.
    """

    title: str
    arguments: Callable[[Mapping[str, Any]], Sequence[str]]
    pool: Callable[[], ServePool] | None = None
    plugins: str = ""
    launcher: tuple[str, ...] = LAUNCHER
    reuses: bool = True
    splits_kv: bool = False
    by_default: bool = True

    @property
    def shares(self) -> bool:
        """True where a second server can use what the first has computed."""
        return self.pool is not None

    @property
    def servers(self) -> int:
        return 2 if self.shares else 1


def _ours(title: str, *, by_default: bool = True, **direct: Any) -> System:
    def arguments(pool: Mapping[str, Any]) -> Sequence[str]:
        return linked_args({**pool, **direct})

    return System(
        title, arguments, MemcacheServePool, plugins="ascend_direct", by_default=by_default
    )


def _hicache(
    title: str,
    backend: str,
    pool: Callable[[], ServePool],
    extra: Callable[[Mapping[str, Any]], Mapping[str, Any]],
) -> System:
    """Three tiers. Policies: those with which the pool's pages are really used (see `--help`)."""
    options = [
        "--enable-hierarchical-cache",
        # Host memory for all that a turn computes. SGLang's 2 would be 200 MB more per server.
        *("--hicache-ratio", "1.25"),
        *("--hicache-write-policy", "write_through"),
        *("--hicache-io-backend", "direct"),
        *("--hicache-mem-layout", "page_first_direct"),
        *("--hicache-storage-backend", backend),
        *("--hicache-storage-prefetch-policy", "wait_complete"),
    ]

    def arguments(pool: Mapping[str, Any]) -> Sequence[str]:
        return [*options, "--hicache-storage-backend-extra-config", json.dumps(extra(pool))]

    return System(title, arguments, pool, launcher=HICACHE_LAUNCHER, splits_kv=True)


def _npu_memcache(pool: Mapping[str, Any]) -> dict[str, Any]:
    """Its names for our options of MemCache; servers are pure clients, as ours are."""
    wanted = ("meta_service_url", "config_store_url", "protocol", "max_dram_size", "world_size")
    return {name: pool["memcache"][name] for name in wanted} | {"dram_size": "0", "device_id": 0}


SYSTEMS: dict[str, System] = {
    "none": System("no cache", lambda _: ["--disable-radix-cache"], reuses=False),
    "l1": System("SGLang, device cache only", lambda _: []),
    "hicache": _hicache(
        "SGLang HiCache, three tiers on MemCache", "npu_memcache", MemcacheServePool, _npu_memcache
    ),
    "hicache-mooncake": _hicache(
        "SGLang HiCache, three tiers on Mooncake", "mooncake", MooncakePool, dict
    ),
    "ours": _ours("ascend_direct"),
    "ours-lookahead": _ours("ascend_direct, load_mode lookahead", load_mode="lookahead"),
    "ours-packed": _ours("ascend_direct, transfer packed", transfer="packed", by_default=False),
}
DEFAULT = [name for name, system in SYSTEMS.items() if system.by_default]


class Running:
    """The servers of one system, and its pool, until the end of `undo`.

    They load while the caller goes on; `wait_ready` before they are asked.
    """

    def __init__(
        self,
        name: str,
        model: Path,
        server_args: Sequence[str],
        *,
        env: Mapping[str, str],
        log_dir: Path,
        undo: ExitStack,
        progress: Progress,
    ) -> None:
        self.name = name
        self.system = SYSTEMS[name]
        self.pool: ServePool | None = None
        self.servers: list[SGLangServer] = []
        # Every server gets an allow-list: else the plugins that are installed load in all of them.
        plugins = {"SGLANG_PLUGINS": self.system.plugins or "none", "PYTHONPATH": python_path()}
        self._start(model, server_args, {**env, **plugins}, log_dir, undo, progress)

    def _start(
        self,
        model: Path,
        args: Sequence[str],
        env: dict[str, str],
        log_dir: Path,
        undo: ExitStack,
        progress: Progress,
    ) -> None:
        system = self.system
        if system.pool is not None:
            self.pool = system.pool()
            undo.callback(self.pool.stop)
            self.pool.start()
            env |= self.pool.environment()
        options = self.pool.options() if self.pool else {}
        for letter in "AB"[: system.servers]:
            server = SGLangServer(
                model,
                [*args, *system.arguments(options)],
                env=env,
                name=f"{self.name} {letter}",
                log_path=log_dir / f"{self.name}_{letter}.log",
                progress=progress,
                launcher=system.launcher,
            )
            undo.callback(server.stop)
            server.start()
            self.servers.append(server)

    def wait_ready(self) -> None:
        """Wait until all servers answer."""
        for server in self.servers:
            server.wait_ready()

    def server(self, where: str) -> SGLangServer:
        """The one that is asked: the first, or for "cross" the one that did not compute it."""
        return self.servers[-1 if where == "cross" else 0]

    def stored_keys(self) -> int:
        """Objects in its pool; 0 without one."""
        return self.pool.stored_pages() if self.pool else 0


def stop_all(running: Sequence[Running]) -> None:
    """End all servers at the same time: each takes seconds."""
    servers = [server for system in running for server in system.servers]
    with ThreadPoolExecutor(len(servers)) as pool:
        list(pool.map(SGLangServer.stop, servers))


def python_path() -> str:
    """PYTHONPATH with which a server process finds `bench.hicache_server`."""
    return os.pathsep.join(filter(None, (str(SCRIPTS), os.environ.get("PYTHONPATH", ""))))
