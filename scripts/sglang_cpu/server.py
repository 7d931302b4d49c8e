# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Starts and ends one real SGLang server on the CPU.

Owns the environment and the arguments that a CPU needs (all of them are here), the process and its
log. Requests are `client`'s; which plugins a server loads is its caller's choice.

    with SGLangServer(make_model(folder / "gqa", "gqa"), ["--page-size", "128"]) as server:
        print(server.generate(range(10, 400), 16).cached_tokens)
"""

from __future__ import annotations

import atexit
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import psutil  # type: ignore[import-untyped]

from .client import Generation, RequestError, SGLangClient
from .process_tree import ProcessTree

__all__ = ["CPU_ARGS", "CPU_ENV", "Generation", "RequestError", "SGLangServer", "ServerStartError"]

LOOPBACK = "127.0.0.1"
LAUNCHER = (sys.executable, "-W", "ignore", "-m", "sglang.launch_server")
# Our own plugins, and the variable with which each is switched on.
PLUGINS = {"mla_on_cpu": "SGLANG_CPU_MLA", "attention_on_cpu": "SGLANG_CPU_ATTENTION"}

CPU_ENV: Mapping[str, str] = {
    # Without it the model loader looks for vllm's kernels.
    "SGLANG_USE_CPU_ENGINE": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Two servers with a thread per core each fight over the cores: about eight times slower.
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    # glibc would give the temporaries of a forward back to the kernel and have them mapped anew for
    # the next one, by chance more or less in each process: with MLA up to a third of an L1 hit.
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
    # A CUDA build of torch brings NCCL, and SGLang would take it for ranks on a CPU too.
    "SGLANG_NCCL_SO_PATH": "none",
    # A crashed server would wait a minute for a dump that only a GPU writes.
    "SGLANG_CUDA_COREDUMP_BEFORE_CRASH_WAIT_SECS": "0",
    "PYTHONUNBUFFERED": "1",
}
CPU_ARGS: tuple[str, ...] = (
    *("--device", "cpu"),
    *("--attention-backend", "torch_native"),
    *("--page-size", "64"),
    *("--max-total-tokens", "32768"),
    # An idle scheduler would otherwise spin on a core that another server needs.
    "--sleep-on-idle",
)

Environment = Callable[[Path, int, Mapping[str, str]], dict[str, str]]

_PORTS = range(20000, 30000)  # below the kernel's range for outgoing connections
_LOG_TAIL_LINES = 40
_EXCEPTION = re.compile(r"^\w[\w.]*(?:Error|Exception)\b.*$", re.MULTILINE)
_PROGRESS_EVERY_S = 10.0


class ServerStartError(RuntimeError):
    """A server did not come up; the message carries the end of its log."""


def print_progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def free_port() -> int:
    """A loopback port that nothing listens on."""
    for port in random.SystemRandom().sample(_PORTS, 100):
        with socket.socket() as probe:
            try:
                probe.bind((LOOPBACK, port))
            except OSError:
                continue
            return port
    raise ServerStartError(f"no free port found in {_PORTS.start}..{_PORTS.stop - 1}")


def cpu_environment(model: Path, tp_size: int, extra: Mapping[str, str]) -> dict[str, str]:
    """The environment of a server process: ours, what a CPU needs, what the caller adds."""
    env = {**os.environ, **CPU_ENV}
    # SGLang asks itself over HTTP while it warms up; that must not go through a proxy.
    for name in ("NO_PROXY", "no_proxy"):
        env[name] = ",".join(filter(None, (env.get(name), LOOPBACK, "localhost")))
    if tp_size > 1:
        cores = sorted(os.sched_getaffinity(0))
        ranks = (str(cores[rank % len(cores)]) for rank in range(tp_size))
        env["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(ranks)
    if "kv_lora_rank" in _model_config(model):
        env["SGLANG_CPU_MLA"] = "1"
    env.update(extra)
    allowed = [name for name in env.get("SGLANG_PLUGINS", "").split(",") if name]
    if allowed:
        wanted = [plugin for plugin, switch in PLUGINS.items() if env.get(switch)]
        env["SGLANG_PLUGINS"] = ",".join(dict.fromkeys((*allowed, *wanted)))
    return env


def model_arguments(model: Path) -> tuple[str, ...]:
    """The arguments that depend on the model."""
    # Left to itself, SGLang runs float32 weights in half precision: wrong here in speed (no fast
    # half-precision arithmetic on most CPUs) and in exactness.
    dtype = _model_config(model).get("torch_dtype")
    dtype_arguments = ("--dtype", str(dtype)) if dtype else ()
    return ("--model-path", str(model), *dtype_arguments)


def _model_config(model: Path) -> dict[str, Any]:
    try:
        config = json.loads((model / "config.json").read_text())
    except (OSError, ValueError):
        return {}  # SGLang explains a broken model better than we could
    return config if isinstance(config, dict) else {}


class SGLangServer(SGLangClient):
    """One server: `with` starts it, waits until it answers, and ends every process of it.

    `args` are added to CPU_ARGS and win over them; `env` wins over CPU_ENV. `start()` and
    `wait_ready()` are separate so that two servers can load at the same time; a stopped server can
    be started again on the same port and appends to the same log. `launcher` is for tests;
    `machine_args` and `environment` replace what a CPU needs on other machines.
    """

    def __init__(
        self,
        model: Path,
        args: Sequence[str] = (),
        *,
        env: Mapping[str, str] | None = None,
        tp_size: int = 1,
        port: int | None = None,
        name: str = "server",
        log_path: Path | None = None,
        start_timeout_s: float = 300.0,
        progress: Callable[[str], None] | None = print_progress,
        launcher: Sequence[str] = LAUNCHER,
        machine_args: Sequence[str] = CPU_ARGS,
        environment: Environment | None = None,
    ) -> None:
        super().__init__(LOOPBACK, free_port() if port is None else port)
        self.name = name
        self.log_path = log_path or Path(tempfile.mkdtemp(prefix="sglang-cpu-")) / f"{name}.log"
        self.startup_s: float | None = None
        address = ("--host", LOOPBACK, "--port", str(self.port))
        parallel = ("--tp-size", str(tp_size)) if tp_size > 1 else ()
        self.command = [
            *launcher,
            *address,
            *machine_args,
            *model_arguments(model),
            *parallel,
            *args,
        ]
        self._env = (environment or cpu_environment)(model, tp_size, env or {})
        self._start_timeout_s = start_timeout_s
        self._progress = progress or (lambda line: None)
        self._process: subprocess.Popen[bytes] | None = None
        self._tree: ProcessTree | None = None
        self._started_at = 0.0
        self._log_start = 0

    def __enter__(self) -> SGLangServer:
        self.start()
        self.wait_ready()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int | None:
        """Process and session id; None before the first start."""
        return self._process.pid if self._process else None

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the process; returns at once."""
        if self.is_running:
            raise RuntimeError(f"{self.name} is already running")
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as log:
            self._log_start = log.tell()
            self._process = self._spawn(log)
        self._tree = ProcessTree(self._process.pid)
        self.startup_s = None
        self._started_at = time.monotonic()
        atexit.register(self.kill)

    def _spawn(self, log: IO[bytes]) -> subprocess.Popen[bytes]:
        # Its own session: a Ctrl-C at the terminal reaches us, and we end the server in order.
        return subprocess.Popen(
            self.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=self._env,
            start_new_session=True,
        )

    def wait_ready(self, timeout_s: float | None = None) -> None:
        """Wait until the server answers; a server that does not come up is killed.

        Raises:
            ServerStartError: it ended or did not answer in time; the message shows its log.
        """
        try:
            self._poll_until_healthy(self._start_timeout_s if timeout_s is None else timeout_s)
        except BaseException:
            self.kill()
            raise
        self.startup_s = time.monotonic() - self._started_at
        self.peak_rss_bytes()  # also learns the processes, for the case that the leader dies first
        self._progress(f"{self.name}: ready after {self.startup_s:.0f} s at {self.url}")

    def _poll_until_healthy(self, timeout_s: float) -> None:
        process = self._require_process()
        next_report = _PROGRESS_EVERY_S
        while True:
            code = process.poll()
            if code is not None:
                raise ServerStartError(self._failure(f"ended with code {code} while starting"))
            if self.is_healthy():
                return
            waited = time.monotonic() - self._started_at
            if waited > timeout_s:
                raise ServerStartError(self._failure(f"gave no answer within {timeout_s:.0f} s"))
            if waited >= next_report:
                next_report += _PROGRESS_EVERY_S
                self._progress(f"{self.name}: loading, {waited:.0f} s, {self._last_log_line()}")
            time.sleep(0.3)

    def _failure(self, what: str) -> str:
        text = self.log_text()
        # SGLang's own epilogue can push the exception out of the tail.
        errors = _EXCEPTION.findall(text)
        reason = f" Last exception: {errors[-1]}" if errors else ""
        tail = "\n".join(text.splitlines()[-_LOG_TAIL_LINES:])
        return f"{self.name} {what}.{reason}\nEnd of {self.log_path}:\n{tail}"

    def _last_log_line(self) -> str:
        lines = [line for line in self.log_text().splitlines() if line.strip()]
        return lines[-1][:100] if lines else "no output yet"

    def log_text(self) -> str:
        """What the server has written since its last start."""
        try:
            with self.log_path.open("rb") as log:
                log.seek(self._log_start)
                return log.read().decode(errors="replace")
        except FileNotFoundError:
            return ""

    def peak_rss_bytes(self) -> int:
        """Peak resident memory of all its processes; an upper bound (shared pages count twice)."""
        return self._tree.peak_rss_bytes() if self._tree else 0

    def processes(self) -> list[psutil.Process]:
        """Its live processes."""
        return self._tree.processes() if self._tree else []

    def pss_bytes(self) -> int:
        """Memory that its processes take now."""
        return self._tree.pss_bytes() if self._tree else 0

    def stop(self, timeout_s: float = 30.0) -> None:
        """Ask the server to end, then make it; afterwards none of its processes is left.

        One that has not answered yet is not asked: it would load to its end first.
        """
        if self.is_running and self.startup_s is not None:
            self.peak_rss_bytes()
            process = self._require_process()
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self._progress(f"{self.name}: still up {timeout_s:.0f} s after SIGTERM, killing it")
        self.kill()

    def kill(self) -> None:
        """SIGKILL every process of this server (a crash, as the others see it); safe to repeat."""
        if self._tree is not None:
            self._tree.kill()
        if self._process is not None:
            self._process.wait()
        atexit.unregister(self.kill)

    def _require_process(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise RuntimeError(f"{self.name} was not started")
        return self._process
