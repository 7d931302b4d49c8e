# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""The two worlds of a run: a MemCache pool with two servers, and a local store on a full disk.

Owns their sizes and options. Everything started here is ended here.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from sglang_cpu.server import LAUNCHER
from two_instances.cluster import Cluster, LocalPool, MemcachePool

from tests.e2e.farm import CHECKS
from tests.e2e.faults import FaultyPool

from .events import MEMBERS, SERVERS
from .run import Plan, Run
from .traffic import PromptPool
from .world import World

# Device memory for a few prompts only, so that most hits are the pool's; few may run at a time, so
# that others wait.
SERVER_ARGS = (
    *("--page-size", "16"),
    *("--max-total-tokens", "8192"),
    *("--max-running-requests", "3"),
    *("--chunked-prefill-size", "512"),
)
# A token is 2 KiB in the tiny model: the members hold 24 thousand, the prompts are more.
MEMBER_SIZE = "16MB"
# One that was killed counts until MetaService has missed it.
WORLD_SIZE = 64
# A store that fits its disk at the start, until others fill it: what is left is a third.
DISK_BYTES = 48 << 20
STORE_SIZE, LEFT_BYTES = "36MB", 12 << 20
ORACLE = "no cache"
FILLER = "filler"

Say = Callable[[str], None]


@contextmanager
def strict_checks() -> Iterator[None]:
    """SGLang's own invariant checks, in servers started inside."""
    before = {name: os.environ.get(name) for name in CHECKS}
    os.environ.update(CHECKS)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def memcache(
    plan: Plan, families: tuple[int, int], model: Path, folder: Path, say: Say
) -> tuple[dict[str, Any], PromptPool]:
    """Two servers on three members; the answers of a third server that caches nothing are right."""
    inner = MemcachePool(members=MEMBERS, member_size=MEMBER_SIZE, world_size=WORLD_SIZE)
    pool = FaultyPool(folder / "provider", inner)
    with (
        strict_checks(),
        Cluster(
            pool,
            model,
            SERVER_ARGS,
            direct=_direct(plan),
            servers=SERVERS,
            log_dir=folder / "logs",
            progress=say,
        ) as cluster,
    ):
        oracle = cluster.servers.pop(ORACLE)
        say("asking a server without a cache what is right")
        prompts = PromptPool.asked(oracle, *families, plan.seed)
        oracle.stop()
        run = Run(World(cluster.servers, pool, inner), prompts, plan, say)
        run.go()
        result = run.result()
        result["pool"] = {"name": pool.name, "members": MEMBERS, "member_size": MEMBER_SIZE}
        if not result["interrupted"]:
            result["pool"] |= {"pages_at_the_end": pool.stored_pages()}
            result["pool"] |= inner.meta.capacity()["cpu"]
        return result, prompts


def full_disk(
    plan: Plan, prompts: PromptPool, model: Path, folder: Path, say: Say
) -> dict[str, Any]:
    """One server whose local store finds its disk full long before it is as large as it may be."""
    path = (folder / "disk").absolute()
    inner = LocalPool(STORE_SIZE, path)
    pool = FaultyPool(folder / "provider", inner)
    plan = replace(
        plan,
        tracks=("store", "requests"),
        rest_every_s=plan.length_s,
        direct={"verify": "off", **plan.direct},  # the local store has checksums of its own
    )
    mounts = (
        shutil.which("unshare") and not subprocess.run(["unshare", "--mount", "true"]).returncode
    )
    with (
        strict_checks(),
        Cluster(
            pool,
            model,
            SERVER_ARGS,
            direct=_direct(plan),
            servers=("D",),
            reference=False,
            log_dir=folder / "logs",
            progress=say,
            launcher=_on_small_tmpfs(path) if mounts else LAUNCHER,
        ) as cluster,
    ):
        server = cluster.servers["D"]
        if mounts:
            (_inside(server.pid, path) / FILLER).write_bytes(bytes(DISK_BYTES - LEFT_BYTES))
        else:
            say("no right to mount: the disk is a limit on the size of files")
            for process in server.processes():
                process.rlimit(resource.RLIMIT_FSIZE, (LEFT_BYTES, resource.RLIM_INFINITY))
        run = Run(World(cluster.servers, pool, None), prompts, plan, say)
        run.go()
        result = run.result()
        used = _used_bytes(_inside(server.pid, path))
        result["disk"] = {"left_bytes": LEFT_BYTES, "store_bytes": used, "tmpfs": bool(mounts)}
        if used < LEFT_BYTES * 0.8 and not result["interrupted"]:
            result["problems"].append(f"the disk was never full: the store took {used} bytes")
        return result


def _direct(plan: Plan) -> dict[str, Any]:
    """The servers' options: deadlines that a run meets often, small loads counted too."""
    return {
        "lookup_timeout_ms": plan.lookup_timeout_ms,
        "load_timeout_ms": plan.load_timeout_ms,
        "store_timeout_ms": plan.store_timeout_ms,
        "min_load_tokens": 64,
        # MemCache may not let a server in again for minutes; it serves all the same.
        "on_pool_unavailable": "degrade",
        "log_interval_s": 5,
        # MemCache 1.3 may give out another key's bytes as good (docs/operations.md, MetaService
        # restarted): only digests see that. `--direct '{"verify": "off"}'` shows it.
        "verify": "all",
        **plan.direct,
    }


def _on_small_tmpfs(path: Path) -> tuple[str, ...]:
    """Starts a server in a mount namespace of its own; the mount ends with the server."""
    mount = f'mount -t tmpfs -o size={DISK_BYTES},mode=700 tmpfs {path} && exec "$@"'
    return ("unshare", "--mount", "sh", "-c", mount, "sh", *LAUNCHER)


def _inside(pid: int | None, path: Path) -> Path:
    """The same directory as a server sees it, mounts of its own included."""
    return Path(f"/proc/{pid}/root{path}")


def _used_bytes(folder: Path) -> int:
    """Blocks that the store's files take."""
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != FILLER]
    return sum(file.stat().st_blocks * 512 for file in files)
