# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""A real MemCache MetaService in a process of its own, for demos, tests and benchmarks.

Owns the service's process, ports, run directory and end, and asks it questions over HTTP. It starts
no pool member: a member is any process with ``environment`` set that connects to the two URLs.

    with MetaServiceProcess(protocol="host_shm") as meta:
        subprocess.Popen(member, env={**os.environ, **meta.environment})
        meta.wait_linked(members=1, timeout_s=30)
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ascend_emulation

HOST = "127.0.0.1"
_POLL_S = 0.05
_HTTP_TIMEOUT_S = 5.0
_START_ATTEMPTS = 3
_LOG_TAIL_LINES = 15


class PoolError(RuntimeError):
    """The MetaService did not do what was asked. The message ends with what to do."""


@dataclass(frozen=True)
class ServiceConfig:
    """What the MetaService process is told, as JSON on its command line."""

    meta_port: int
    store_port: int
    metrics_port: int
    log_path: str
    lease_ttl_ms: int
    host: str = HOST


@dataclass(frozen=True)
class Links:
    """How many members have joined, and how many of the links between them stand."""

    active_members: int
    connected: int
    expected: int

    def complete(self, members: int) -> bool:
        return self.active_members >= members and self.connected == self.expected


def free_ports(count: int) -> list[int]:
    """Ports on the loopback interface that nobody listens on at this moment."""
    listeners = [socket.create_server((HOST, 0)) for _ in range(count)]
    try:
        return [int(listener.getsockname()[1]) for listener in listeners]
    finally:
        for listener in listeners:
            listener.close()


def _is_taken(port: int) -> bool:
    try:
        socket.create_server((HOST, port)).close()
    except OSError:
        return True
    return False


class _HttpClient:
    """One kept-alive connection. With ``Connection: close`` the service holds answers for 7 s."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection(HOST, port, timeout=_HTTP_TIMEOUT_S)
        self._lock = threading.Lock()

    def get(self, path: str) -> bytes:
        with self._lock:
            is_reused = self._connection.sock is not None
            try:
                return self._ask(path)
            except (OSError, http.client.HTTPException):
                if not is_reused:  # a kept connection may have been ended by the service
                    raise
                return self._ask(path)

    def _ask(self, path: str) -> bytes:
        try:
            self._connection.request("GET", path)
            response = self._connection.getresponse()
            body = response.read()
        except (OSError, http.client.HTTPException):
            self._connection.close()
            raise
        if response.status != http.client.OK:
            raise PoolError(f"the MetaService answered {response.status} to {path}")
        return body

    def close(self) -> None:
        with self._lock:
            self._connection.close()


class MetaServiceProcess:
    """A MetaService from ``start()`` (or ``with``) to ``stop()``; it never outlives this process.

    ``environment`` is what members need on top of their own variables. By default it is the
    emulation's; on a machine with NPUs pass the one that is right there, ``{}`` as a rule.
    ``run_dir`` defaults to a new tmpfs directory that ``stop()`` removes.
    """

    def __init__(
        self,
        *,
        protocol: str = "host_shm",
        environment: Mapping[str, str] | None = None,
        run_dir: Path | None = None,
        lease_ttl_ms: int = 100,
        start_timeout_s: float = 30.0,
        stop_grace_s: float = 6.0,
        python: Path | None = None,
    ) -> None:
        self.protocol = protocol
        self.environment: dict[str, str] = dict(environment or {})
        self._emulated = environment is None
        self._given_run_dir = run_dir
        self._lease_ttl_ms = lease_ttl_ms
        self._start_timeout_s = start_timeout_s
        self._stop_grace_s = stop_grace_s
        self._python = str(python or sys.executable)
        self._run_dir: Path | None = None
        self._config: ServiceConfig | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._http: _HttpClient | None = None

    # ---- life --------------------------------------------------------------------------------

    def start(self) -> MetaServiceProcess:
        if self._process is not None:
            raise PoolError("this MetaService has been started: stop it first")
        self._run_dir = self._given_run_dir or ascend_emulation.private_run_dir()
        try:
            if self._emulated:
                tree = ascend_emulation.build()
                self.environment = ascend_emulation.environment(
                    tree, self._run_dir, protocol=self.protocol
                )
            self._start_on_free_ports()
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """End the service: SIGTERM, after ``stop_grace_s`` SIGKILL. Stopping twice is fine."""
        self._end_process()
        if self._run_dir is not None and self._given_run_dir is None:
            shutil.rmtree(self._run_dir, ignore_errors=True)
        self._run_dir, self._config = None, None

    def kill(self) -> None:
        """SIGKILL, as in a crash; the addresses stay, for `start_again`."""
        if self._process is not None:
            self._process.kill()
        self._end_process()

    def send_signal(self, number: int) -> None:
        if self._process is not None:
            self._process.send_signal(number)

    def start_again(self) -> None:
        """After `kill`: a new process at the same addresses, in the same run directory."""
        self._spawn(self._running_config())
        if not self._becomes_healthy():
            raise PoolError(self._failure())

    def __enter__(self) -> MetaServiceProcess:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _start_on_free_ports(self) -> None:
        """Another process may take a port between the choice and the service's bind: try again."""
        for attempt in range(1, _START_ATTEMPTS + 1):
            ports = free_ports(3)
            meta, store, metrics = ports
            self._config = ServiceConfig(
                meta, store, metrics, str(self.run_dir), self._lease_ttl_ms
            )
            self._spawn(self._config)
            if self._becomes_healthy():
                return
            reason = self._failure()
            self._end_process()
            if attempt == _START_ATTEMPTS or not any(_is_taken(port) for port in ports):
                raise PoolError(reason)

    def _spawn(self, config: ServiceConfig) -> None:
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [self._python, str(Path(__file__).resolve()), json.dumps(asdict(config))],
                env={**os.environ, **self.environment},
                stdin=subprocess.PIPE,  # its end tells the service that this process has ended
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self._http = _HttpClient(config.metrics_port)

    def _becomes_healthy(self) -> bool:
        deadline = time.monotonic() + self._start_timeout_s
        while time.monotonic() < deadline and self.returncode is None:
            try:
                if json.loads(self._get("/health")).get("service_ready"):
                    return self.returncode is None  # else a stranger answers on this port
            except (OSError, http.client.HTTPException, ValueError, PoolError):
                pass
            time.sleep(_POLL_S)
        return False

    def _failure(self) -> str:
        what = (
            f"was not healthy within {self._start_timeout_s:g} s"
            if self.returncode is None
            else f"ended with status {self.returncode}"
        )
        return (
            f"the MetaService {what} while it started.\n{self.log_tail()}\n"
            "Check that memcache_hybrid 1.3.0 is installed for this Python, that no other "
            f"MetaService uses {self.run_dir}, and read the lines above."
        )

    def _end_process(self) -> None:
        if self._http is not None:
            self._http.close()
        process, self._process, self._http = self._process, None, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(self._stop_grace_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdin is not None:
            process.stdin.close()

    # ---- where it is -------------------------------------------------------------------------

    @property
    def run_dir(self) -> Path:
        if self._run_dir is None:
            raise PoolError("the MetaService is not running: start it first")
        return self._run_dir

    @property
    def log_file(self) -> Path:
        """Everything the process printed."""
        return self.run_dir / "meta_service.log"

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    @property
    def returncode(self) -> int | None:
        """None while the process runs."""
        return None if self._process is None else self._process.poll()

    @property
    def meta_service_url(self) -> str:
        return f"tcp://{HOST}:{self._running_config().meta_port}"

    @property
    def config_store_url(self) -> str:
        return f"tcp://{HOST}:{self._running_config().store_port}"

    @property
    def metrics_url(self) -> str:
        return f"http://{HOST}:{self._running_config().metrics_port}"

    def log_tail(self) -> str:
        """The end of what the process printed, and of the service's own log."""
        parts = []
        for path in (self.log_file, self.run_dir / "logs" / "mmc-meta.log"):
            if path.is_file():
                lines = path.read_text(errors="replace").splitlines()[-_LOG_TAIL_LINES:]
                parts.append(f"--- {path}\n" + "\n".join(lines))
        return "\n".join(parts)

    def _running_config(self) -> ServiceConfig:
        if self._config is None:
            raise PoolError("the MetaService is not running: start it first")
        return self._config

    # ---- what it says ------------------------------------------------------------------------

    def cluster_status(self) -> dict[str, Any]:
        """Members and links, as the service's ``/api/v1/mf/cluster_status`` words it."""
        return self._json("/api/v1/mf/cluster_status")

    def links(self) -> Links:
        summary = self.cluster_status()["mf_cluster"][0]["server"]["groupManager"]["linkSummary"]
        return Links(
            active_members=summary["activeRanks"],
            connected=summary["connectedLinks"],
            expected=summary["expectedLinks"],
        )

    def wait_linked(self, members: int, timeout_s: float) -> Links:
        """Wait until this many members have joined and each has mapped every other's memory.

        A member's ``init()`` returns up to 2 s earlier, and puts that land on it in between fail.
        """
        deadline = time.monotonic() + timeout_s
        while not (links := self.links()).complete(members):
            if time.monotonic() > deadline:
                raise PoolError(
                    f"{members} members were not linked within {timeout_s:g} s: {links}. "
                    "Check that each of them has started, and reads the same two URLs"
                )
            time.sleep(_POLL_S)
        return links

    def keys(self) -> list[str]:
        """Every key in the pool, sorted."""
        return sorted(self._text("/get_all_keys").splitlines())

    def capacity(self) -> dict[str, Any]:
        """Bytes by medium (``cpu``, ``npu``), as ``/api/v1/capacity/usage`` words it."""
        return self._json("/api/v1/capacity/usage")

    def _json(self, path: str) -> dict[str, Any]:
        answer = json.loads(self._text(path))
        if not isinstance(answer, dict):
            raise PoolError(f"the MetaService answered {answer!r} to {path}")
        return answer

    def _text(self, path: str) -> str:
        self._running_config()
        try:
            return self._get(path).decode()
        except (OSError, http.client.HTTPException) as error:
            state = "" if self.returncode is None else f" (it ended with {self.returncode})"
            raise PoolError(
                f"the MetaService did not answer {path}{state}: {error!r}\n{self.log_tail()}"
            ) from error

    def _get(self, path: str) -> bytes:
        if self._http is None:
            raise PoolError("the MetaService is not running: start it first")
        return self._http.get(path)


# ---- inside the process of the service -------------------------------------------------------


def _end_with_parent(grace_s: float = 6.0) -> None:
    """The parent never writes to our stdin: that it can be read means that the parent has ended."""
    sys.stdin.buffer.read()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(grace_s)
    os._exit(1)


def _serve(config: ServiceConfig) -> int:
    from memcache_hybrid import MetaConfig, MetaService

    settings = MetaConfig()
    settings.meta_service_url = f"tcp://{config.host}:{config.meta_port}"
    settings.config_store_url = f"tcp://{config.host}:{config.store_port}"
    settings.metrics_url = f"http://{config.host}:{config.metrics_port}"
    settings.log_path = config.log_path
    settings.lease_ttl_ms = config.lease_ttl_ms
    threading.Thread(target=_end_with_parent, name="end-with-parent", daemon=True).start()
    code = MetaService.setup(settings)
    if code == 0:
        code = MetaService.main()  # returns when the service has ended; 0 is also "refused"
    print(f"MetaService returned {code}", flush=True)
    return 0 if code == 0 else 1


if __name__ == "__main__":
    sys.exit(_serve(ServiceConfig(**json.loads(sys.argv[1]))))
