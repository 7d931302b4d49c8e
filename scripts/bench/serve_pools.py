# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""The pools that scripts/bench/serve puts under its systems, and how they are emptied.

Both kinds hold pages of the same size in a process that is no server, and both hand them over
through shared memory. Owns Mooncake's processes, and how a pool is emptied between turns.
MemCache's processes are two_instances'.
"""

from __future__ import annotations

import http.client
import json
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from abc import abstractmethod
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from memcache_pool import HOST, free_ports
from two_instances.cluster import MemcachePool, Pool, PoolProcessError

POOL_SIZE = "768MB"
START_TIMEOUT_S = 30.0
STOP_GRACE_S = 8.0
LOG_TAIL_LINES = 15

_BIN = Path(sys.executable).parent
_NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class ServePool(Pool):
    """A pool that can be emptied while servers are on it."""

    @abstractmethod
    def clear(self) -> None:
        """Remove all pages, so that the next turn is given the same memory.

        In other memory it would measure how each process maps that at its first touch (a real pool
        has its memory pinned), and in a full pool eviction.

        Raises:
            PoolProcessError: it cannot be emptied.
        """


class MemcacheServePool(MemcachePool, ServePool):
    """MemCache over shared memory, on the driver emulation."""

    def __init__(self) -> None:
        super().__init__(member_size=POOL_SIZE)


class MooncakePool(ServePool):
    """Mooncake's master and one store process, which holds all pages.

    Servers are "dummy clients" of that process: it has their host memory mapped, so that a page is
    one copy within it. It is the fastest way that Mooncake has on one machine; with a client in
    each server, pages would cross a TCP socket.
    """

    name = "Mooncake (store process, shared memory)"

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="mooncake-"))
        self._undo = ExitStack()
        self._admin_url = ""
        self._store_address = ""

    def start(self) -> None:
        self._undo.callback(shutil.rmtree, self._folder, ignore_errors=True)
        rpc, admin, store = free_ports(3)
        self._admin_url = f"http://{HOST}:{admin}"
        self._store_address = f"{HOST}:{store}"
        master = [f"--rpc_address={HOST}", f"--rpc_port={rpc}", "--rpc_thread_num=2"]
        master += [f"--metrics_host={HOST}", f"--metrics_port={admin}"]
        master += ["--enable_metric_reporting=false"]
        self._spawn("mooncake_master", master, "/health")
        # No metadata service: its processes find each other by themselves.
        client = [f"--host={HOST}", f"--port={store}", f"--master_server_address={HOST}:{rpc}"]
        client += ["--metadata_server=P2PHANDSHAKE", "--protocol=tcp"]
        client += [f"--global_segment_size={POOL_SIZE}"]
        self._spawn("mooncake_client", client, "/get_all_segments")

    def _spawn(self, program: str, options: list[str], ready_path: str) -> None:
        """Start it and wait until the master has something to say at `ready_path`."""
        path = self._folder / f"{program}.log"
        with path.open("wb") as log:
            process = subprocess.Popen(
                [str(_BIN / program), *options],
                cwd=self._folder,  # a crash may leave a core file
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._undo.callback(_end, process)
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline_s and process.poll() is None:
            try:
                if self._ask("GET", ready_path).strip():
                    return
            except PoolProcessError:
                pass
            time.sleep(0.1)
        tail = "\n".join(path.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:])
        self.stop()
        raise PoolProcessError(
            f"{program} did not start (what it needs is told by scripts/sglang_cpu/install.py; "
            f"--systems leaves Mooncake out). Its log ends with:\n{tail}"
        )

    def stop(self) -> None:
        self._undo.close()

    def options(self) -> dict[str, Any]:
        """SGLang's --hicache-storage-backend-extra-config."""
        return {"standalone_storage": True, "client_server_address": self._store_address}

    def stored_pages(self) -> int:
        return len(self._ask("GET", "/get_all_keys").split())

    def clear(self) -> None:
        """All but what was read in the last 10 s: Mooncake keeps that."""
        answer = self._ask("POST", "/api/v1/remove_all")
        if not json.loads(answer).get("success"):
            raise PoolProcessError(f"the pool could not be emptied: {answer}")

    def _ask(self, method: str, path: str) -> str:
        request = urllib.request.Request(self._admin_url + path, method=method)
        try:
            with _NO_PROXY.open(request, timeout=5.0) as response:
                text: str = response.read().decode()
        except (OSError, http.client.HTTPException) as error:
            raise PoolProcessError(f"Mooncake's master did not answer {path}: {error}") from error
        return text


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
