# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""The processes of a run: the pool's, the servers', how they are hurt and brought back.

Owns who is down when: a request on a server that we killed is lost with it and nobody's fault.
Which process is hurt when is `events`'.
"""

from __future__ import annotations

import contextlib
import itertools
import signal
import threading
import time
from collections import Counter

from memcache_pool import PoolError
from sglang_cpu.client import RequestError
from sglang_cpu.server import ServerStartError, SGLangServer
from two_instances.cluster import MemcachePool
from two_instances.run import make_prompts

from tests.e2e.faults import FaultyPool

from .events import Event

# Long enough for a server to come to its next pool call; after that it is killed from outside.
REACH_A_CALL_S = 15.0
START_TIMEOUT_S = 240.0
# A client killed in a put can keep others out of the pool for minutes.
START_ATTEMPTS = 8
WATCH_S = 0.5
# Joining takes a second or two.
JOIN_TIMEOUT_S = 20.0
JOINED = "joined tcp://"


class World:
    """Servers on a pool behind the faulty store.

    Args:
        memcache: the pool's processes; None where the pool has none (the local store).
        problems: takes a sentence about what must not happen.
    """

    def __init__(
        self, servers: dict[str, SGLangServer], pool: FaultyPool, memcache: MemcachePool | None
    ) -> None:
        self.servers = servers
        self.pool = pool
        self.memcache = memcache
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []
        self._down: dict[str, list[list[float]]] = {name: [] for name in servers}
        self._stopped_members: set[int] = set()
        self._end = threading.Event()
        self._lock = threading.Lock()
        self._restarting = threading.Lock()
        self._watcher = threading.Thread(target=self._watch, name="watch")

    def start(self) -> None:
        """Begin to look after the processes."""
        self._watcher.start()

    def stop(self) -> None:
        """Hurt nobody any more; what was stopped has gone on before."""
        self._end.set()
        if self._watcher.is_alive():
            self._watcher.join()

    # ---- servers ----------------------------------------------------------------------------

    def serving(self) -> list[str]:
        """Names of the servers that are meant to answer."""
        with self._lock:
            return [n for n, downs in self._down.items() if not downs or len(downs[-1]) == 2]

    def was_down(self, name: str, begin_s: float, end_s: float) -> bool:
        """Whether we had killed this server at any moment between the two."""
        with self._lock:
            return any(
                down[0] <= end_s and (len(down) == 1 or begin_s <= down[1])
                for down in self._down[name]
            )

    def kill_server(self, event: Event) -> None:
        """SIGKILL in the middle of a put or a get, then a new process in its place."""
        with self._restarting:
            if self.serving() == list(self.servers):
                self._kill_in_call(event)
            else:
                self.counts["kill_server_spared"] += 1  # one that answers must be left

    def _kill_in_call(self, event: Event) -> None:
        server = self.servers[event.target]
        with self._lock:
            self._down[event.target].append([time.monotonic()])
        operation, delay_ms = event.mode.split()
        deadline_s = time.monotonic() + REACH_A_CALL_S
        strangers = itertools.count()
        with self.pool.faults.on("die", f"{operation} {server.pid} {delay_ms}"):
            while server.is_running and time.monotonic() < deadline_s and not self._end.is_set():
                _store_something(server, next(strangers))
                time.sleep(0.02)
        where = "between_calls" if server.is_running else f"in_a_{operation}"
        self.counts[f"servers_killed_{where}"] += 1
        self.bring_up(event.target)

    def bring_up(self, name: str) -> None:
        """Start a server until it answers; it is down until then."""
        server = self.servers[name]
        for _ in range(START_ATTEMPTS):
            server.kill()
            if self._end.is_set():
                return
            server.start()
            try:
                server.wait_ready(START_TIMEOUT_S)
            except ServerStartError:
                self.counts["server_starts_refused"] += 1
                continue
            with self._lock:
                self._down[name][-1].append(time.monotonic())
            return
        self.problems.append(f"server {name} did not come back in {START_ATTEMPTS} attempts")

    # ---- the pool ---------------------------------------------------------------------------

    def hurt_pool(self, event: Event) -> None:
        """Kill or stop a process of the pool, and undo it."""
        getattr(self, f"_{event.kind}")(event)

    def _kill_meta_service(self, event: Event) -> None:
        assert self.memcache is not None
        self.memcache.meta.kill()
        self._end.wait(event.lasts_s)
        self.memcache.meta.start_again()

    def _stop_meta_service(self, event: Event) -> None:
        assert self.memcache is not None
        self.memcache.meta.send_signal(signal.SIGSTOP)
        self._end.wait(event.lasts_s)
        self.memcache.meta.send_signal(signal.SIGCONT)

    def _kill_member(self, event: Event) -> None:
        assert self.memcache is not None
        number = int(event.target)
        self._stopped_members.add(number)
        member = self.memcache.members[number]
        member.kill()
        member.wait()
        self._end.wait(event.lasts_s)
        if not self._joins_again(number):
            self.heal()

    def _stop_member(self, event: Event) -> None:
        assert self.memcache is not None
        member = self.memcache.members[int(event.target)]
        member.send_signal(signal.SIGSTOP)
        self._end.wait(event.lasts_s)
        member.send_signal(signal.SIGCONT)

    def _joins_again(self, number: int) -> bool:
        """Start a member in place of one that is dead; whether it gets in soon."""
        assert self.memcache is not None
        log = self.memcache.member_log(number)
        before = log.read_text(errors="replace").count(JOINED)
        self.memcache.replace_member(number)
        self._stopped_members.discard(number)
        deadline_s = time.monotonic() + JOIN_TIMEOUT_S
        while time.monotonic() < deadline_s and not self._end.is_set():
            if log.read_text(errors="replace").count(JOINED) > before:
                return True
            self._end.wait(0.2)
        return False

    def heal(self) -> None:
        """What docs/operations.md tells to do when nobody gets into the pool any more.

        After a restart of MetaService it may not know the addresses of some who joined before, and
        then keeps everyone out who would have to link with them: they are restarted one by one.
        """
        assert self.memcache is not None
        self.counts["pool_healed_by_restarts"] += 1
        for number, member in enumerate(self.memcache.members):
            self._stopped_members.add(number)
            member.kill()
            member.wait()
            if self._joins_again(number):
                return
        for name in self.servers:
            with self._restarting:
                with self._lock:
                    self._down[name].append([time.monotonic()])
                self.servers[name].stop()
                self.bring_up(name)
            if self._joins_again_all():
                return

    def _joins_again_all(self) -> bool:
        """Whether every member is in the pool within the usual time."""
        assert self.memcache is not None
        with contextlib.suppress(PoolError):
            self.memcache.meta.wait_linked(len(self.memcache.members), JOIN_TIMEOUT_S)
            return True
        return False

    # ---- what ends by itself ------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._end.wait(WATCH_S):
            for name in self.serving():
                if not self.servers[name].is_running:
                    self.problems.append(f"server {name} ended by itself")
                    with self._lock:
                        self._down[name].append([time.monotonic()])
                    self.bring_up(name)
            for number, member in enumerate(self.memcache.members if self.memcache else ()):
                if member.poll() is not None and number not in self._stopped_members:
                    self.counts["members_ended_by_themselves"] += 1
                    self.memcache.replace_member(number)  # type: ignore[union-attr]


def _store_something(server: SGLangServer, number: int) -> None:
    """A prompt of its own: what everybody asks is in the pool and would not be put again."""
    (prompt,) = make_prompts(1, 200, seed=1_000_000 + number)
    with contextlib.suppress(RequestError):  # the server is about to die
        server.generate(prompt, 1, stream=False, timeout_s=REACH_A_CALL_S)
