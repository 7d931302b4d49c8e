# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""What MemCache's MetaService tells over TCP and HTTP: does it listen, who is linked, how full.

Owns the reading of its HTTP answers, which are checked because they come from the network. Does not
own the data path, and never imports the native client: tools ask without joining the pool.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import socket
import threading
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from ascend_direct.errors import StoreUnavailable

CONNECT_TIMEOUT_S = 3.0
POLL_INTERVAL_S = 0.1
_MAX_ANSWER_BYTES = 8 << 20
# A list of keys has about 100 bytes for each, and is asked for by tools only.
_MAX_LIST_BYTES = 1 << 30
LIST_TIMEOUT_S = 60.0
_NO_WORLD_SIZE = (1 << 32) - 1
# Nobody there, not HTTP, not JSON, not the expected JSON, and JSON nested to break the parser.
_NO_ANSWER = (
    OSError,
    http.client.HTTPException,
    ValueError,
    LookupError,
    TypeError,
    RecursionError,
)


@dataclass(frozen=True)
class Links:
    """How far the members of a pool have mapped each other's memory.

    Attributes:
        members: processes in the pool, pure clients included.
        connected, expected: directed links between them.
        world_size: most members, as the first of them configured it; None before it joined.
    """

    members: int
    connected: int
    expected: int
    world_size: int | None

    @property
    def complete(self) -> bool:
        """Every member reaches every other."""
        return self.connected == self.expected


@dataclass(frozen=True)
class Usage:
    """Bytes of the pool's memory, DRAM and HBM together, and the pages in it."""

    capacity_bytes: int
    used_bytes: int
    pages: int | None


def require_listening(option: str, url: str) -> None:
    """Raise unless something accepts connections at `url`.

    Joining a pool whose MetaService is not there blocks the native client for over six minutes.

    Raises:
        StoreUnavailable: with the option to correct and what to start.
    """
    parts = urlsplit(url)
    try:
        socket.create_connection((parts.hostname, parts.port), CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        raise StoreUnavailable(
            "connect",
            f"nobody listens at {url} ({error}): start the MetaService of the pool, or correct "
            f"memcache.{option}",
        ) from error


class MetaServiceHttp:
    """The HTTP side of a MetaService, over one kept connection: asked to close, it loses answers.

    Args:
        url: ``http://host:port``.
        timeout_s: bound on each question.
    """

    def __init__(self, url: str, timeout_s: float = CONNECT_TIMEOUT_S) -> None:
        self._url = url
        self._parts = urlsplit(url)
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._connection: http.client.HTTPConnection | None = None

    def links(self) -> Links | None:
        """The members and their links; None when it does not answer in the expected form."""
        try:
            server = json.loads(self._get("/api/v1/mf/cluster_status"))["mf_cluster"][0]["server"]
            summary = server["groupManager"]["linkSummary"]
            counts = [summary[n] for n in ("activeRanks", "connectedLinks", "expectedLinks")]
            members, connected, expected, size = _naturals(*counts, server["worldSize"])
            return Links(members, connected, expected, None if size == _NO_WORLD_SIZE else size)
        except _NO_ANSWER:
            return None

    def usage(self) -> Usage | None:
        """How full the pool is; None when it does not answer in the expected form."""
        try:
            media = json.loads(self._get("/api/v1/capacity/usage"))
            cpu, npu = media["cpu"], media["npu"]
            total = sum(_naturals(cpu["total_bytes"], npu["total_bytes"]))
            used = sum(_naturals(cpu["used_bytes"], npu["used_bytes"]))
            keys = re.match(r"keys=(\d{1,18})\b", self._get("/metrics/summary"))
            return Usage(total, used, int(keys[1]) if keys else None)
        except _NO_ANSWER:
            return None

    def keys(self, prefix: str) -> list[str]:
        """The keys of the pool that start with `prefix`.

        Raises:
            StoreUnavailable: no answer.
        """
        asking = MetaServiceHttp(self._url, LIST_TIMEOUT_S)
        try:
            names = asking._get("/get_all_keys", _MAX_LIST_BYTES).splitlines()
        except _NO_ANSWER as error:
            what = f"{self._url} does not list them ({error}): start it, or correct that URL."
            raise StoreUnavailable("keys", what) from error
        finally:
            asking.close()
        return [name for name in names if name.startswith(prefix)]

    def wait_linked(self, timeout_s: float) -> Links | None:
        """Poll until every member is linked; the last answer, complete or not, when time is up."""
        deadline = time.monotonic() + timeout_s
        while True:
            links = self.links()
            if (links is not None and links.complete) or time.monotonic() >= deadline:
                return links
            time.sleep(POLL_INTERVAL_S)

    def close(self) -> None:
        """Drop the connection; a later question opens a new one."""
        with self._lock:
            self._drop()

    def _get(self, path: str, limit_bytes: int = _MAX_ANSWER_BYTES) -> str:
        with self._lock:
            fresh = self._connection is None
            try:
                return self._ask(path, limit_bytes)
            except (OSError, http.client.HTTPException):
                self._drop()
                if fresh:
                    raise
            try:  # the service may have closed an idle connection, or have been restarted
                return self._ask(path, limit_bytes)
            except (OSError, http.client.HTTPException):
                self._drop()
                raise

    def _ask(self, path: str, limit_bytes: int) -> str:
        if self._connection is None:
            secure = self._parts.scheme == "https"
            kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
            self._connection = kind(
                self._parts.hostname or "", self._parts.port, timeout=self._timeout_s
            )
        if self._connection.sock is None:
            self._connection.connect()
        # The socket's own timeout starts again with every byte; this one bounds the whole answer.
        alarm = threading.Timer(self._timeout_s, _hang_up, (self._connection.sock,))
        alarm.start()
        try:
            self._connection.request("GET", path)
            answer = self._connection.getresponse()
            body = answer.read(limit_bytes)
        finally:
            alarm.cancel()
        if answer.status != http.client.OK or not answer.isclosed():
            raise http.client.HTTPException(f"{path}: status {answer.status}")
        return body.decode("utf-8", "replace")

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _hang_up(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it may have been closed
        sock.shutdown(socket.SHUT_RDWR)


def _naturals(*values: Any) -> list[int]:
    if not all(type(value) is int and value >= 0 for value in values):
        raise ValueError(f"not counts: {values!r}")
    return list(values)
