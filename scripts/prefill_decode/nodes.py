# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""A prefill node, decode nodes and their routers on this machine, linked to one pool or not.

Owns the options that SGLang's disaggregation needs on a CPU, and the routers. Servers themselves
are sglang_cpu.server's, the pool is two_instances.cluster's. Everything started here is ended here.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sglang_cpu.client import RequestError, SGLangClient
from sglang_cpu.process_tree import ProcessTree
from sglang_cpu.server import LOOPBACK, SGLangServer, free_port
from two_instances.cluster import Pool, linked_args

ROUTER_START_TIMEOUT_S = 90.0
# SGLang serves disaggregation on GPUs and NPUs; these make it run between CPU processes.
CPU_ENV = {"SGLANG_CPU_PD": "1", "MC_FORCE_TCP": "1", "SGLANG_HOST_IP": LOOPBACK}
PREFILL_ARGS = ("--disaggregation-mode", "prefill", "--disable-overlap-schedule")
DECODE_ARGS = ("--disaggregation-mode", "decode")
PLAIN_DECODE_ARGS = ("--disaggregation-decode-retraction-backup", "none")

Progress = Callable[[str], None]


class RouterError(RuntimeError):
    """A router did not start; the message shows its log."""


class Router(SGLangClient):
    """SGLang's router before one prefill and one decode node; `stop` ends it."""

    def __init__(self, prefill: str, bootstrap_port: int, decode: str, log_path: Path) -> None:
        super().__init__(LOOPBACK, free_port())
        self._log_path = log_path
        self._command = [
            *(sys.executable, "-W", "ignore", "-m", "sglang_router.launch_router"),
            *("--host", LOOPBACK, "--port", str(self.port), "--pd-disaggregation"),
            *("--prefill", prefill, str(bootstrap_port), "--decode", decode),
            *("--policy", "random", "--prometheus-port", str(free_port())),
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it knows both nodes; they must be up."""
        with self._log_path.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline_s = time.monotonic() + ROUTER_START_TIMEOUT_S
        while time.monotonic() < deadline_s and self._process.poll() is None:
            if self._knows_its_nodes():
                return
            time.sleep(0.2)
        self.stop()
        tail = self._log_path.read_text(errors="replace")[-2000:]
        raise RouterError(f"the router did not start; its log ends with:\n{tail}")

    def _knows_its_nodes(self) -> bool:
        """Its `/health` is fine before it has found any."""
        try:
            self.get_text("/readiness", timeout_s=5.0)
        except RequestError:
            return False
        return True

    def stop(self) -> None:
        if self._process is not None:
            ProcessTree(self._process.pid).kill()
            self._process.wait()


class Nodes:
    """One prefill node, and decode nodes each behind a router of its own.

    Args:
        model: model folder.
        server_args: SGLang options of every node.
        direct: options of the cache, on top of the pool's.
        decodes: names of the decode nodes → whether they are linked to the pool.
        tp_sizes: tensor-parallel ranks by node name (``prefill`` or a decode node's), 1 if absent.
        node_args: further SGLang options by node name.
    """

    def __init__(
        self,
        pool: Pool,
        model: Path,
        server_args: Sequence[str] = (),
        *,
        direct: Mapping[str, Any] | None = None,
        decodes: Mapping[str, bool] | None = None,
        tp_sizes: Mapping[str, int] | None = None,
        node_args: Mapping[str, Sequence[str]] | None = None,
        log_dir: Path | None = None,
        progress: Progress = print,
    ) -> None:
        self.pool = pool
        self.model = model
        self._log_dir = log_dir or Path(tempfile.mkdtemp(prefix="prefill-decode-"))
        self._progress = progress
        self._undo = ExitStack()
        self._bootstrap_port = free_port()
        self._common = [
            *server_args,
            *("--disaggregation-transfer-backend", "mooncake"),
            *("--disaggregation-bootstrap-port", str(self._bootstrap_port)),
        ]
        self._direct = dict(direct or {})
        self._decodes = dict(decodes or {"decode": True})
        self._tp_sizes = dict(tp_sizes or {})
        self._node_args = dict(node_args or {})
        self.servers: dict[str, SGLangServer] = {}
        self.routers: dict[str, Router] = {}

    def __enter__(self) -> Nodes:
        try:
            self._progress(f"starting the pool: {self.pool.name}")
            self._undo.callback(self.pool.stop)
            self.pool.start()
            self._start_servers()
            self._start_routers()
        except BaseException:
            self._undo.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    @property
    def prefill(self) -> SGLangServer:
        return self.servers["prefill"]

    def _start_servers(self) -> None:
        self._add("prefill", PREFILL_ARGS, linked=True)
        for name, linked in self._decodes.items():
            self._add(name, (*DECODE_ARGS, *(() if linked else PLAIN_DECODE_ARGS)), linked=linked)
        self._progress(f"starting {len(self.servers)} SGLang servers: {', '.join(self.servers)}")
        for server in self.servers.values():
            server.start()
        for server in self.servers.values():
            server.wait_ready()

    def _add(self, name: str, role: Sequence[str], *, linked: bool) -> None:
        args = [*self._common, *role, *self._node_args.get(name, ())]
        plugins = ["pd_on_cpu"]
        env = dict(CPU_ENV)
        if linked:
            args += linked_args({**self.pool.options(), **self._direct})
            plugins.append("ascend_direct")
            env |= self.pool.environment()
        server = SGLangServer(
            self.model,
            args,
            env={**env, "SGLANG_PLUGINS": ",".join(plugins)},
            tp_size=self._tp_sizes.get(name, 1),
            name=name,
            log_path=self._log_dir / f"{name.replace(' ', '_')}.log",
            progress=self._progress,
        )
        self.servers[name] = server
        self._undo.callback(server.stop)

    def _start_routers(self) -> None:
        for name in self._decodes:
            router = Router(
                self.prefill.url,
                self._bootstrap_port,
                self.servers[name].url,
                self._log_dir / f"router_of_{name.replace(' ', '_')}.log",
            )
            self._undo.callback(router.stop)
            router.start()
            self.routers[name] = router

    def restart_decode(self, name: str) -> None:
        """Start a decode node that has ended; its router finds it again by itself."""
        self.servers[name].start()
        self.servers[name].wait_ready()
