# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""`ascend-direct meta`: MemCache's MetaService in the foreground, from the servers' own file.

Owns the checks of its settings and the life of its process. The native service is
store/memcache_meta's; how it is installed (systemd, Kubernetes) is manifests'.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from enum import Enum
from pathlib import Path
from types import FrameType
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer

from ascend_direct.cli import manifests
from ascend_direct.cli.conventions import EXIT_OK, EXIT_UNAVAILABLE, complain, option
from ascend_direct.config import DirectConfig, MemcacheConfig
from ascend_direct.errors import ConfigError
from ascend_direct.store import memcache_host
from ascend_direct.store.meta_service import MetaServiceHttp

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 10.0
HTTP_PORT = 8000
# What MemCache's election reads (memcache-hybrid 1.3.0).
HA_ENVIRONMENT = ("META_POD_NAME", "META_NAMESPACE", "META_LEASE_NAME")
LOG_DIR = "/var/log/memcache_hybrid"  # MemCache's own default


class Output(str, Enum):
    """What to write instead of starting it."""

    config = "config"
    systemd = "systemd"
    kubernetes = "kubernetes"


Config = Annotated[
    str | None,
    option("--config", "JSON or @file, as the servers have it: its URLs are used."),
]
High = Annotated[int, typer.Option("--evict-above", help="Fill, in percent, that starts eviction.")]
Low = Annotated[int, typer.Option("--evict-to", help="Fill, in percent, at which eviction ends.")]
LogDir = Annotated[str, typer.Option("--log-dir", help="Where MetaService writes its log.")]
Print = Annotated[
    Output | None,
    typer.Option(
        "--print", help="Write a configuration file, unit or manifests to stdout, and end."
    ),
]
Image = Annotated[
    str, typer.Option("--image", help="Container image for --print kubernetes, with this package.")
]
Replicas = Annotated[
    int,
    typer.Option(
        "--replicas",
        min=1,
        help="Of --print kubernetes: with 2 and more MemCache elects a leader (tried on no "
        "cluster: E0).",
    ),
]
Namespace = Annotated[
    str,
    typer.Option(
        "--namespace", help="Of --print kubernetes; else kubectl's own, with --replicas `default`."
    ),
]
Ha = Annotated[
    bool,
    typer.Option("--ha", help=f"One of several, on Kubernetes; needs {', '.join(HA_ENVIRONMENT)}."),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object per event.")]


def meta(
    config: Config = None,
    evict_above: High = 90,
    evict_to: Low = 80,
    log_dir: LogDir = LOG_DIR,
    show: Print = None,
    image: Image = "",
    replicas: Replicas = 1,
    namespace: Namespace = "",
    ha: Ha = False,
    as_json: AsJson = False,
) -> None:
    """Run the pool's MetaService until SIGTERM or Ctrl-C; one per host, and per pool but for --ha.

    Listens at memcache.meta_service_url, config_store_url and metrics_url (port 8000 of the same
    host where that is not set), with memcache.tls. Prints one line when it is ready.

    Exit codes: 0 ended by a signal, or printed; 2 bad configuration, or this machine cannot; 3 it
    did not start, or ended by itself.
    """
    try:
        settings = _settings(config)
        options = _options(settings, evict_above, evict_to, log_dir, ha)
        if show is not None:
            cluster = manifests.Cluster(image, replicas, namespace)
            typer.echo(_text(show, config, options, cluster), nl=False)
            return
        if replicas > 1:
            raise ConfigError(["--replicas goes with --print kubernetes; a replica runs --ha."])
        reasons = _reasons_here(settings, options)
        if reasons:
            raise ConfigError(reasons)
    except ConfigError as error:
        raise typer.Exit(complain(error)) from None
    raise typer.Exit(_Service(options, settings, as_json).run())


def _settings(source: str | None) -> MemcacheConfig:
    settings = DirectConfig.load(source).memcache
    if settings.metrics_url:
        return settings
    host = urlsplit(settings.meta_service_url).hostname
    shown = f"[{host}]" if ":" in (host or "") else host
    return settings.model_copy(update={"metrics_url": f"http://{shown}:{HTTP_PORT}"})


def _options(
    settings: MemcacheConfig, evict_above: int, evict_to: int, log_dir: str, ha: bool
) -> dict[str, Any]:
    """MetaService's settings by its own names.

    Raises:
        ConfigError: with every reason.
    """
    urls = {
        n: getattr(settings, n) for n in ("meta_service_url", "config_store_url", "metrics_url")
    }
    reasons = []
    if not 1 <= evict_to < evict_above <= 100:
        reasons.append(
            f"--evict-to {evict_to}, --evict-above {evict_above}: use 1 … 100, the first smaller."
        )
    places = [(urlsplit(url).hostname, urlsplit(url).port) for url in urls.values()]
    if len(set(places)) < len(places):
        reasons.append("meta_service_url, config_store_url, metrics_url: give each its own port.")
    if reasons:
        raise ConfigError(reasons)
    return {
        **urls,
        "evict_threshold_high": evict_above,
        "evict_threshold_low": evict_to,
        "log_path": log_dir,
        "log_level": settings.log_level,
        **({"ha_enable": True} if ha else {}),
    }


def _reasons_here(settings: MemcacheConfig, options: dict[str, Any]) -> list[str]:
    """Why it cannot run on this machine: software, files, addresses."""
    named = memcache_host.problems_by_name(settings)
    reasons = [*named["memcache"], *named["Ascend software"], *named["TLS files"]]
    for name in ("meta_service_url", "config_store_url", "metrics_url"):
        if problem := _cannot_listen(options[name]):
            reasons.append(f"memcache.{name}: {problem}")
    reasons += _reasons_against_election() if "ha_enable" in options else []
    folder = Path(options["log_path"])
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reasons.append(f"--log-dir {folder}: {error.strerror}; use a folder of yours.")
    else:
        if not os.access(folder, os.W_OK):
            reasons.append(f"--log-dir {folder} cannot be written: use a folder of yours.")
    return reasons


def _reasons_against_election() -> list[str]:
    """What MemCache's election lacks; it would say so in its log only."""
    missing = [name for name in HA_ENVIRONMENT if not os.environ.get(name)]
    reasons = []
    if missing:
        reasons.append(
            f"--ha: {', '.join(missing)} not set: start from what --print kubernetes writes."
        )
    if importlib.util.find_spec("kubernetes") is None:
        reasons.append("--ha: MemCache's election needs it: pip install kubernetes.")
    return reasons


def _cannot_listen(url: str) -> str | None:
    parts = urlsplit(url)
    family = socket.AF_INET6 if ":" in (parts.hostname or "") else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((parts.hostname, parts.port))
        except OSError as error:
            what = error.strerror or error
            return f"nobody can listen at {url} on this host ({what}): stop who does, or change it."
    return None


def _text(
    show: Output, source: str | None, options: dict[str, Any], cluster: manifests.Cluster
) -> str:
    if cluster.replicas > 1 and show is not Output.kubernetes:
        raise ConfigError([f"--replicas goes with --print kubernetes, not {show.value}."])
    if show is Output.config:
        return manifests.config_file(options)
    if source is None or not source.startswith("@/"):
        raise ConfigError([f"--print {show.value} names the file: give --config @/path/to/file."])
    if show is Output.systemd:
        if "ha_enable" in options:
            raise ConfigError(["--ha is for Kubernetes: give --print kubernetes --replicas 2."])
        return manifests.systemd_unit(source, options)
    if "ha_enable" in options and cluster.replicas == 1:
        raise ConfigError(["--ha is what replicas run: give --replicas 2 or more instead."])
    if not cluster.image:
        raise ConfigError(["--print kubernetes needs --image: one that has this package."])
    return manifests.kubernetes(source, options, cluster)


class _Service:
    """The process of one MetaService, from its start to its end."""

    def __init__(self, options: dict[str, Any], settings: MemcacheConfig, as_json: bool) -> None:
        self._options = options
        self._settings = settings
        self._as_json = as_json
        self._asked_to_end = False
        self._process: subprocess.Popen[bytes] | None = None

    def run(self) -> int:
        """Serve; returns the exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        # A session of its own: at the terminal Ctrl-C reaches us, and we end it in order.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "ascend_direct.store.memcache_meta", json.dumps(self._options)],
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr.fileno(),
            env={**os.environ, **DirectConfig(memcache=self._settings).secret_environment()},
            start_new_session=True,
        )
        if self._becomes_ready():
            self._say("ready", f"MetaService listens at {self._options['meta_service_url']}")
            self._wait_for_its_end()
        return self._end()

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._asked_to_end = True

    def _becomes_ready(self) -> bool:
        http = MetaServiceHttp(self._options["metrics_url"])
        deadline_s = time.monotonic() + START_TIMEOUT_S
        try:
            while time.monotonic() < deadline_s and self._is_wanted():
                if http.usage() is not None:
                    return self._is_wanted()
                time.sleep(0.1)
        finally:
            http.close()
        return False

    def _is_wanted(self) -> bool:
        assert self._process is not None
        return not self._asked_to_end and self._process.poll() is None

    def _wait_for_its_end(self) -> None:
        while self._is_wanted():
            time.sleep(0.2)

    def _end(self) -> int:
        assert self._process is not None
        code = self._process.poll()
        if code is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._asked_to_end:
            self._say("ended", "MetaService has ended")
            return EXIT_OK
        what = f"ended with {code}" if code is not None else "is not ready"
        typer.echo(
            f"ascend-direct: MetaService {what}: another may run on this host, MemCache allows "
            f"one; its log is in {self._options['log_path']}.",
            err=True,
        )
        return EXIT_UNAVAILABLE

    def _say(self, event: str, line: str) -> None:
        if self._as_json:
            urls = {name: url for name, url in self._options.items() if name.endswith("_url")}
            line = json.dumps({"event": event, "pid": os.getpid(), **urls})
        typer.echo(line)
        sys.stdout.flush()
