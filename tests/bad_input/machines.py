# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Machines that something is wrong with: files, libraries, hardware, services, stores.

Each function takes the row's `Place` and changes one thing; what it changes is changed back.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import shutil
import socket
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ascend_direct.config import LocalConfig
from ascend_direct.integration import seam
from ascend_direct.store import base, memcache_host
from ascend_direct.store.local_file import open_environment

from ..fakes.memory_store import MemoryPool, MemoryStore
from ..integration.launching import model_path
from .row import Place

TABLES = (b"objects", b"stamps", b"ages")


class _Less:
    """An import finder that does not find one library, nor its distribution."""

    def __init__(self, finder: Any, library: str) -> None:
        self._finder, self._library = finder, library

    def __getattr__(self, name: str) -> Any:
        return getattr(self._finder, name)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        blocked = name.partition(".")[0] == self._library
        return None if blocked else self._finder.find_spec(name, path, target)

    def find_distributions(self, context: Any) -> Any:
        find = getattr(self._finder, "find_distributions", lambda context: ())
        blocked = (context.name or "").replace("-", "_") == self._library
        return () if blocked else find(context)


def without(library: str, *importers: str) -> Callable[[Place], None]:
    """`library` is not installed, and `importers` have not been imported yet."""

    def prepare(place: Place) -> None:
        place.patch.setattr(sys, "meta_path", [_Less(f, library) for f in sys.meta_path])
        for name in list(sys.modules):
            if name in importers or name.partition(".")[0] == library:
                place.patch.delitem(sys.modules, name)

    return prepare


def with_version(distribution: str, version: str) -> Callable[[Place], None]:
    """Another version of a library is installed."""

    def prepare(place: Place) -> None:
        installed = importlib.metadata.version
        place.patch.setattr(
            importlib.metadata,
            "version",
            lambda name: version if name == distribution else installed(name),
        )

    return prepare


def cann(place: Place) -> None:
    """All that the MemCache client wants to see of Ascend's software, and no hardware at all."""
    library = place.path / "cann" / "lib64" / "libascendcl.so"
    library.parent.mkdir(parents=True)
    library.touch()
    place.patch.setenv("ASCEND_HOME_PATH", str(library.parent.parent))
    place.patch.setenv("LD_LIBRARY_PATH", str(library.parent))
    place.patch.delenv(memcache_host.EMULATION_ENV, raising=False)

    def path(*parts: Any) -> Path:
        hardware = str(parts[0]).startswith(("/dev", "/sys")) and len(parts) == 1
        return place.path / "no-hardware" if hardware else Path(*parts)

    place.patch.setattr(memcache_host, "Path", path)


def no_cann(place: Place) -> None:
    """A machine without Ascend's software."""
    for name in ("ASCEND_HOME_PATH", "LD_LIBRARY_PATH"):
        place.patch.delenv(name, raising=False)


def listening(place: Place) -> int:
    """A port of this host where something answers until the test ends."""
    server = place.until_end.enter_context(socket.create_server(("127.0.0.1", 0)))
    return int(server.getsockname()[1])


def half_a_meta_service(place: Place) -> None:
    """MetaService answers, its config store does not."""
    cann(place)
    url = f"tcp://127.0.0.1:{listening(place)}"
    place.patch.setenv("ASCEND_DIRECT_MEMCACHE__META_SERVICE_URL", url)


def a_pool(place: Place) -> None:
    """A machine that could join a MemCache pool, as far as can be told without one."""
    half_a_meta_service(place)
    url = os.environ["ASCEND_DIRECT_MEMCACHE__META_SERVICE_URL"]
    place.patch.setenv("ASCEND_DIRECT_MEMCACHE__CONFIG_STORE_URL", url)


def port_taken(place: Place) -> None:
    """Another process listens at this one's own address."""
    a_pool(place)
    url = f"tcp://127.0.0.1:{listening(place)}"
    place.patch.setenv("ASCEND_DIRECT_MEMCACHE__HCOM_URL", url)


def a_pool_of_eight(place: Place) -> None:
    """MetaService says over HTTP that the pool has room for eight members."""
    a_pool(place)
    manager = {"linkSummary": {"activeRanks": 0, "connectedLinks": 0, "expectedLinks": 0}}
    answer = {"mf_cluster": [{"server": {"groupManager": manager, "worldSize": 8}}]}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = place.until_end.enter_context(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
    place.until_end.callback(server.shutdown)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    place.patch.setenv("ASCEND_DIRECT_MEMCACHE__METRICS_URL", url)


def emulation(place: Place) -> None:
    """The Ascend driver is the repository's stand-in."""
    place.patch.setenv(memcache_host.EMULATION_ENV, "1")


def little_shared_memory(place: Place) -> None:
    """1 MiB of shared memory is left."""
    a_pool(place)
    place.patch.setattr(
        memcache_host.os, "statvfs", lambda _: SimpleNamespace(f_bavail=256, f_frsize=4096)
    )


def existing_file(name: str, content: bytes = b"") -> Callable[[Place], None]:
    """There is a file of that name."""

    def prepare(place: Place) -> None:
        (place.path / name).write_bytes(content)

    return prepare


def pages(
    size_bytes: int = 4 << 20, spoil: Callable[[Path], object] | None = None
) -> Callable[[Place], None]:
    """A local store of that size, closed, and what happened to it then."""

    def prepare(place: Place) -> None:
        folder = place.path / "pages"
        environment, _ = open_environment(folder, LocalConfig(size_bytes=size_bytes), TABLES)
        environment.close()
        if spoil is not None:
            spoil(folder)

    return prepare


def model_without(*suffixes: str) -> Callable[[Place], None]:
    """The model's directory, less the files with these suffixes, is {place}/model."""

    def prepare(place: Place) -> None:
        ignored = shutil.ignore_patterns(*(f"*{suffix}" for suffix in suffixes))
        shutil.copytree(model_path(), place.path / "model", ignore=ignored)

    return prepare


def sglang_differs(place: Place) -> None:
    """SGLang has moved one symbol and renamed a parameter of another."""
    rows = (
        seam.Seam("sglang.srt.mem_cache.registry.create_tree", (), "contract", "the cache", "-"),
        seam.Seam("sglang.srt.mem_cache.utils.get_storage_hash_str", ("size",), "read", "x", "-"),
    )
    place.patch.setattr(seam, "problems", functools.partial(seam.problems, rows))
    place.patch.setattr(seam, "version", lambda _: "0.6.0")


def provider(load: Callable[[], Any]) -> Callable[[Place], None]:
    """A third-party store `acme` is installed; `load` is its entry point."""

    def prepare(place: Place) -> None:
        entries = [SimpleNamespace(name="acme", load=load)]
        place.patch.setattr(base, "entry_points", lambda group: entries)

    return prepare


def raising(error: Exception) -> Callable[..., Any]:
    """A function that does nothing else."""

    def function(*args: object, **named: object) -> Any:
        raise error

    return function


class UnhappyStore(MemoryStore):
    """A provider's store that knows why it cannot work here."""

    def problems(self) -> list[str]:
        return ["acme has no licence on this host: install one."]


def unhappy_store(_section: dict[str, Any]) -> base.PageStore:
    return UnhappyStore(MemoryPool())


def json_file(name: str, options: Any, encoding: str = "utf-8") -> Callable[[Place], None]:
    """A configuration file."""
    return existing_file(name, json.dumps(options, ensure_ascii=False).encode(encoding))


def each(*steps: Callable[[Place], None]) -> Callable[[Place], None]:
    """One after the other."""

    def prepare(place: Place) -> None:
        for step in steps:
            step(place)

    return prepare
