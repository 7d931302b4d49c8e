# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""A pool and servers on it, on this machine: start, restart, end.

Owns the pool's processes and the options servers need to join it. Servers themselves are
sglang_cpu.server's; MetaService is memcache_pool's. Everything started here is ended here.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import memcache_pool
from sglang_cpu.server import LAUNCHER, SGLangServer

from ascend_direct.names import CONFIG_FLAG, FLAG

MEMBER_START_TIMEOUT_S = 60.0
CLEAR_TIMEOUT_S = 60.0
LOG_TAIL_LINES = 15
# On a CPU that servers share a call may take longer than in production; a miss would prove nothing.
PATIENCE = {"lookup_timeout_ms": 5_000, "load_timeout_ms": 20_000}
_COMMAND = str(Path(sys.executable).parent / "ascend-direct")

Progress = Callable[[str], None]


class PoolProcessError(RuntimeError):
    """A process of the pool did not start or has ended; the message shows its log."""


def linked_args(options: Mapping[str, Any]) -> list[str]:
    """SGLang's arguments for a server that uses the cache."""
    return [FLAG, CONFIG_FLAG, json.dumps(options)]


class Pool(ABC):
    """What servers share. `start` before the first server, `stop` after the last."""

    name: str

    @abstractmethod
    def start(self) -> None:
        """Bring the pool up and wait until servers can join."""

    @abstractmethod
    def stop(self) -> None:
        """End every process of the pool and remove what it kept."""

    @abstractmethod
    def options(self) -> dict[str, Any]:
        """A server's ``--hierarchical-cache-direct-config``."""

    def environment(self) -> dict[str, str]:
        """What a server's process needs besides."""
        return {}

    def wait_stored(self, pages: int, timeout_s: float = 30.0) -> int:
        """Wait until it holds that many pages; returns how many it holds."""
        deadline_s = time.monotonic() + timeout_s
        while (held := self.stored_pages()) < pages and time.monotonic() < deadline_s:
            time.sleep(0.05)
        return held

    @abstractmethod
    def stored_pages(self) -> int:
        """Pages in the pool now."""


class LocalPool(Pool):
    """The embedded store in a directory of its own.

    Args:
        size: bound on the stored bytes.
        path: the directory, made by `start` and removed by `stop`; a new one in memory by default.
    """

    name = "local (LMDB)"

    def __init__(self, size: str = "2GB", path: Path | None = None) -> None:
        self._size = size
        self._path = path

    def start(self) -> None:
        if self._path is not None:
            self._path.mkdir(parents=True, exist_ok=True)
            return
        root = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self._path = Path(tempfile.mkdtemp(prefix="ascend_direct-", dir=root))

    def stop(self) -> None:
        if self._path is not None:
            shutil.rmtree(self._path, ignore_errors=True)

    def options(self) -> dict[str, Any]:
        return {"store": "local", "local": {"path": str(self._path), "size_bytes": self._size}}

    def stored_pages(self) -> int:
        from ascend_direct.config import DirectConfig
        from ascend_direct.store.base import StoreContext
        from ascend_direct.store.local import create

        store = create(DirectConfig.load(self.options(), {}).local.model_dump())
        store.open(StoreContext())
        try:
            return store.stats().pages or 0
        finally:
            store.close()


class MemcachePool(Pool):
    """A real MemCache MetaService and members that hold the pages, on the driver emulation.

    Servers are pure clients: pages outlive them.

    Args:
        protocol: MemCache data path.
        members: processes that give DRAM; each holds `member_size`.
        world_size: most processes in the pool; one that was killed counts until it is missed.
    """

    def __init__(
        self,
        protocol: str = "host_shm",
        members: int = 1,
        member_size: str = "1GB",
        world_size: int = 16,
        emulated: bool = True,
    ) -> None:
        self.name = f"MemCache ({protocol}{', driver emulation' if emulated else ''})"
        self._protocol = protocol
        self._member_size = member_size
        self._member_count = members
        self._world_size = world_size
        environment = None if emulated else {}
        self.meta = memcache_pool.MetaServiceProcess(protocol=protocol, environment=environment)
        self.members: list[subprocess.Popen[bytes]] = []
        self._logs = Path(tempfile.mkdtemp(prefix="pool-member-"))

    def start(self) -> None:
        self.meta.start()
        for _ in range(self._member_count):
            self.add_member()
        self.meta.wait_linked(self._member_count, MEMBER_START_TIMEOUT_S)

    def add_member(self) -> subprocess.Popen[bytes]:
        """Start one more process that holds pages, and wait until it has joined."""
        log_path = self.member_log(len(self.members))
        member = self._spawn_member(log_path)
        self.members.append(member)
        self._wait_alive(member, log_path)
        return member

    def replace_member(self, number: int) -> None:
        """Start a member in place of one that has ended; does not wait until it has joined."""
        self.members[number] = self._spawn_member(self.member_log(number))

    def member_log(self, number: int) -> Path:
        """What all processes of that number have printed."""
        return self._logs / f"member-{number}.log"

    def _spawn_member(self, log_path: Path) -> subprocess.Popen[bytes]:
        command = [_COMMAND, "pool", "member"]
        command += ["--config", json.dumps(self.options()), "--dram-size", self._member_size]
        with log_path.open("ab") as log:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.environment()},
                start_new_session=True,
            )

    def _wait_alive(self, member: subprocess.Popen[bytes], log_path: Path) -> None:
        deadline_s = time.monotonic() + MEMBER_START_TIMEOUT_S
        while time.monotonic() < deadline_s and member.poll() is None:
            if self.meta.links().active_members >= len(self.members):
                return
            time.sleep(0.1)
        tail = "\n".join(log_path.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:])
        raise PoolProcessError(f"a pool member did not join; its log ends with:\n{tail}")

    def stop(self) -> None:
        for member in self.members:
            _end(member, timeout_s=8.0)
        self.meta.stop()
        shutil.rmtree(self._logs, ignore_errors=True)

    def options(self) -> dict[str, Any]:
        return {
            "store": "memcache",
            "memcache": {
                "meta_service_url": self.meta.meta_service_url,
                "config_store_url": self.meta.config_store_url,
                "metrics_url": self.meta.metrics_url,
                "protocol": self._protocol,
                "max_dram_size": self._member_size,
                "world_size": self._world_size,
            },
        }

    def environment(self) -> dict[str, str]:
        own = dict(self.meta.environment)
        if self._protocol == "host_tcp":  # each process listens on an address of its own
            (port,) = memcache_pool.free_ports(1)
            own["ASCEND_DIRECT_MEMCACHE__HCOM_URL"] = f"tcp://{memcache_pool.HOST}:{port}"
        return own

    def stored_pages(self) -> int:
        return len(self.meta.keys())

    def clear(self) -> None:
        """Remove every object; servers may be on it.

        Raises:
            PoolProcessError: it could not be emptied.
        """
        command = [_COMMAND, "pool", "clear", "--everything", "--yes"]
        done = subprocess.run(
            [*command, "--config", json.dumps(self.options())],
            env={**os.environ, **self.environment()},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=CLEAR_TIMEOUT_S,
            check=False,
        )
        if done.returncode:
            raise PoolProcessError(f"the pool could not be emptied: {done.stdout}{done.stderr}")


def _end(process: subprocess.Popen[bytes], timeout_s: float) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        process.send_signal(number)
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            continue


class Cluster:
    """Servers of one model on one pool, plus one without any cache to compare with.

    Args:
        model: model folder.
        server_args: SGLang options of every server.
        direct: options of the cache, on top of the pool's.
        servers: names of the servers on the pool, or name → tensor-parallel ranks.
        reference: also start a server with the radix cache off.
        launcher: what starts a server, before its arguments.
    """

    def __init__(
        self,
        pool: Pool,
        model: Path,
        server_args: Sequence[str] = (),
        *,
        direct: dict[str, Any] | None = None,
        servers: Mapping[str, int] | Sequence[str] = ("A", "B"),
        reference: bool = True,
        log_dir: Path | None = None,
        progress: Progress = print,
        launcher: Sequence[str] = LAUNCHER,
    ) -> None:
        self.pool = pool
        self._launcher = launcher
        self._model = model
        self._server_args = list(server_args)
        self._direct = direct or {}
        given = servers if isinstance(servers, Mapping) else dict.fromkeys(servers, 1)
        self._tp_sizes = dict(given)
        self._with_reference = reference
        self._log_dir = log_dir or Path(tempfile.mkdtemp(prefix="two-instances-"))
        self._progress = progress
        self._undo = ExitStack()
        self.servers: dict[str, SGLangServer] = {}

    def __enter__(self) -> Cluster:
        try:
            self._progress(f"starting the pool: {self.pool.name}")
            self._undo.callback(self.pool.stop)
            self.pool.start()
            self._add_servers()
            self.start_servers(list(self.servers))
        except BaseException:
            self._undo.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def _add_servers(self) -> None:
        linked = [*self._server_args, *linked_args({**self.pool.options(), **self._direct})]
        for name, tp_size in self._tp_sizes.items():
            env = {"SGLANG_PLUGINS": "ascend_direct", **self.pool.environment()}
            self._add(name, linked, env, tp_size)
        if self._with_reference:
            self._add("no cache", [*self._server_args, "--disable-radix-cache"], {}, 1)

    def _add(self, name: str, args: Sequence[str], env: dict[str, str], tp_size: int) -> None:
        log_path = self._log_dir / f"{name.replace(' ', '_')}.log"
        server = SGLangServer(
            self._model,
            args,
            env=env,
            tp_size=tp_size,
            name=name,
            log_path=log_path,
            progress=self._progress,
            launcher=self._launcher,
        )
        self.servers[name] = server
        self._undo.callback(server.stop)

    def start_servers(self, names: Sequence[str]) -> None:
        """Start servers side by side and wait until all of them answer."""
        self._progress(f"starting {len(names)} SGLang servers: {', '.join(names)}")
        for name in names:
            self.servers[name].start()
        for name in names:
            self.servers[name].wait_ready()

    def restart(self, names: Sequence[str] | None = None) -> None:
        """Stop and start servers; the pool stays."""
        chosen = list(names or self._tp_sizes)
        for name in chosen:
            self.servers[name].stop()
        self.start_servers(chosen)
