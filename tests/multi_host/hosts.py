# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Hosts without a cluster: network namespaces, each with one cable to a router between them.

Owns namespaces, cables and addresses; programs are run in a host by putting `Host.prefix` in front
of their command. A namespace has no name: it lives as long as the process that holds it, which ends
with this one however this one ends, and a cable goes with either end. So nothing can stay behind
and no two runs can meet.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path

TOOLS = ("ip", "nsenter", "unshare")  # iproute2 and util-linux
ENTER_TIMEOUT_S = 10.0
COMMAND_TIMEOUT_S = 30.0
LISTENING = "0A"  # in /proc/net/tcp
FORWARD = "echo 1 > /proc/sys/net/ipv4/ip_forward"


class NetworkError(RuntimeError):
    """The kernel or a tool refused; the message has the command and what it said."""


@cache
def why_not() -> str | None:
    """Why there can be no hosts here; None if there can. Makes a network of one to find out."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} not found: install iproute2 and util-linux"
    try:
        with Network(1):
            return None
    except NetworkError as error:
        return f"network namespaces are not permitted here ({error}): run as root"


class _Namespace:
    """A network namespace of its own, from construction to `close`."""

    def __init__(self) -> None:
        self._holder = subprocess.Popen(
            ["unshare", "--net", "cat"],  # cat ends when its input does: with this process
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.pid = self._holder.pid
        self.prefix = ("nsenter", f"--net=/proc/{self.pid}/ns/net")
        try:
            self._wait_entered()
        except BaseException:
            self.close()
            raise

    def _wait_entered(self) -> None:
        ours = Path("/proc/self/ns/net").readlink()
        deadline_s = time.monotonic() + ENTER_TIMEOUT_S
        while Path(f"/proc/{self.pid}/ns/net").readlink() == ours:
            if self._holder.poll() is not None or time.monotonic() > deadline_s:
                self._holder.kill()
                assert self._holder.stderr is not None
                raise NetworkError(self._holder.stderr.read().strip() or "unshare did nothing")
            time.sleep(0.01)

    def run(self, *command: str) -> str:
        """Run a command inside to its end; its output. Raises NetworkError if it fails."""
        done = subprocess.run(
            [*self.prefix, *command],
            capture_output=True,
            text=True,
            check=False,
            timeout=COMMAND_TIMEOUT_S,
        )
        if done.returncode:
            raise NetworkError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout

    def close(self) -> None:
        self._holder.kill()
        self._holder.communicate()


class Host:
    """One machine on the network.

    Attributes:
        address: its IPv4 address, the only one it has besides loopback.
        prefix: put in front of a command, makes it run on this host.
    """

    def __init__(self, namespace: _Namespace, router: _Namespace, number: int) -> None:
        self.address, gateway = f"10.77.{number}.2", f"10.77.{number}.1"
        self.prefix: Sequence[str] = namespace.prefix
        self.run = namespace.run
        self._namespace, self._router = namespace, router
        self._port = f"port{number}"
        cable = ("type", "veth", "peer", "name", "eth0", "netns", str(namespace.pid))
        router.run("ip", "link", "add", self._port, *cable)
        router.run("ip", "address", "add", f"{gateway}/24", "dev", self._port)
        router.run("ip", "link", "set", self._port, "up")
        namespace.run("ip", "link", "set", "lo", "up")
        namespace.run("ip", "address", "add", f"{self.address}/24", "dev", "eth0")
        namespace.run("ip", "link", "set", "eth0", "up")
        namespace.run("ip", "route", "add", "default", "via", gateway)

    def unplug(self) -> None:
        """Take its cable away: it runs on, nobody hears of it, no connection is told."""
        self._router.run("ip", "link", "set", self._port, "down")

    def plug_in(self) -> None:
        self._router.run("ip", "link", "set", self._port, "up")

    def listens(self, port: int) -> bool:
        """Whether something on this host accepts connections at a port."""
        table = Path(f"/proc/{self._namespace.pid}/net/tcp").read_text()
        rows = [line.split() for line in table.splitlines()[1:]]
        return any(row[3] == LISTENING and int(row[1][-4:], 16) == port for row in rows)


class Network:
    """Hosts that reach each other over a router and nothing else; `with` makes and removes them."""

    def __init__(self, hosts: int) -> None:
        self.hosts: list[Host] = []
        self._count = hosts
        self._undo = ExitStack()

    def __enter__(self) -> Network:
        try:
            router = self._namespace()
            router.run("sh", "-c", FORWARD)
            self.hosts = [Host(self._namespace(), router, n) for n in range(1, self._count + 1)]
        except BaseException:
            self._undo.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def _namespace(self) -> _Namespace:
        namespace = _Namespace()
        self._undo.callback(namespace.close)
        return namespace
