# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""One run: traffic and events side by side, rests in between, the verdict at the end.

Owns the order of things. Processes are world's, requests traffic's and aborts', bounds
invariants', form report's; where the servers come from is scenarios'.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from two_instances.cluster import PoolProcessError

from . import invariants, report
from .aborts import Aborts
from .events import Event, Pace, schedule
from .traffic import Client, PromptPool, Tally, Traffic
from .world import World

WARM_UP_S = 8.0
RECOVERY_TIMEOUT_S = 60.0
RECOVERY_PROMPTS = 4
PROGRESS_EVERY_S = 10.0


@dataclass(frozen=True)
class Plan:
    """Everything that decides a run, apart from the machine.

    Attributes:
        clients: requests at a time, besides those that are aborted.
        rest_every_s: how often traffic stops so that leaks can be seen.
        lookup_timeout_ms, load_timeout_ms, store_timeout_ms: the servers' options.
        direct: more of them.
    """

    seed: int
    length_s: float
    pace: Pace
    tracks: tuple[str, ...]
    clients: int
    rest_every_s: float
    lookup_timeout_ms: int = 300
    load_timeout_ms: int = 1_200
    store_timeout_ms: int = 3_000
    direct: Mapping[str, Any] = field(default_factory=dict)


class Run:
    """Traffic on a world under a schedule.

    Args:
        say: takes a progress line.
    """

    def __init__(
        self, world: World, prompts: PromptPool, plan: Plan, say: Callable[[str], None]
    ) -> None:
        self._world = world
        self._plan = plan
        self._say = say
        self.tally = Tally()
        self._client = Client(world, prompts, self.tally)
        self._traffic = Traffic(self._client, plan.clients, plan.seed)
        self._aborts = Aborts(self._client, plan.seed)
        self._at_rest = invariants.AtRest(world.servers)
        self.events = schedule(
            plan.seed, plan.length_s, plan.pace, plan.tracks, tuple(world.servers)
        )
        self._done: list[Event] = []
        self._met = 0
        self._problems: list[str] = []
        self._interrupted = False
        self._recovered_s: float | None = None
        self._over = threading.Event()

    def go(self) -> None:
        """Run to the end, or to Ctrl-C; `result` tells about either."""
        self._world.start()
        self._traffic.start()
        try:
            time.sleep(WARM_UP_S)
            self._traffic.pause()
            self._at_rest.begin()
            begin_s = time.monotonic()
            for part in self._parts():
                self._traffic.resume()
                self._play(part, begin_s)
                self._traffic.pause()
                self._say(f"at rest, {len(self._done)} of {len(self.events)} events done")
                self._problems += self._at_rest.problems()
            self._recovered_s = self._recover()
        except KeyboardInterrupt:
            self._say("interrupted; the report covers what was done")
            self._interrupted = True
        finally:
            self._over.set()
            self._world.stop()
            self._traffic.stop()

    # ---- events -----------------------------------------------------------------------------

    def _parts(self) -> list[list[Event]]:
        """The events between two rests."""
        count = max(1, round(self._plan.length_s / self._plan.rest_every_s))
        part_s = self._plan.length_s / count
        return [
            [e for e in self.events if int(min(e.at_s / part_s, count - 1)) == number]
            for number in range(count)
        ]

    def _play(self, part: list[Event], begin_s: float) -> None:
        """Carry events out, each track on a thread of its own."""
        # A rest has taken time: what is left keeps its distances.
        late_s = max(0.0, time.monotonic() - begin_s - part[0].at_s) if part else 0.0
        threads = [
            threading.Thread(
                target=self._track,
                args=([e for e in part if e.track == track], begin_s + late_s),
                name=f"events-{track}",
            )
            for track in self._plan.tracks
        ]
        for thread in threads:
            thread.start()
        due_s = 0.0
        while any(thread.is_alive() for thread in threads):
            time.sleep(0.2)
            if time.monotonic() > due_s:
                due_s = time.monotonic() + PROGRESS_EVERY_S
                self._say(self._progress())

    def _track(self, events: list[Event], begin_s: float) -> None:
        for event in events:
            if self._over.wait(max(0.0, begin_s + event.at_s - time.monotonic())):
                return
            try:
                self._carry_out(event)
            except (PoolProcessError, OSError, RuntimeError) as error:
                self._problems.append(f"{event} could not be carried out: {error}")
            self._done.append(event)

    def _carry_out(self, event: Event) -> None:
        if event.track == "requests":
            self._aborts.carry_out(event)
        elif event.track == "pool":
            self._world.hurt_pool(event)
        elif event.track == "server":
            self._world.kill_server(event)
        else:
            faults, kind = self._world.pool.faults, event.mode.split()[0]
            before = faults.count(event.target, kind)
            with faults.on(event.target, event.mode):
                self._over.wait(event.lasts_s)
            self._met += faults.count(event.target, kind) > before

    def _progress(self) -> str:
        counts = self.tally.counts
        return (
            f"{len(self._done)}/{len(self.events)} events, {counts['answered']} answers "
            f"({counts['answered_from_pool']} from the pool), {len(self.tally.wrong)} wrong, "
            f"{len(self.tally.failed)} failed, serving: {', '.join(self._world.serving())}"
        )

    # ---- the end ----------------------------------------------------------------------------

    def _recover(self) -> float | None:
        """Seconds until every server loads from the pool again; None: it never did.

        Where it does not come by itself, the pool is healed as an operator would.
        """
        begin_s = time.monotonic()
        waiting = self._not_loading(begin_s + RECOVERY_TIMEOUT_S)
        if waiting and self._world.memcache is not None:
            self._say(f"{', '.join(sorted(waiting))} not loading: restarting what is out of reach")
            self._world.heal()
            waiting = self._not_loading(time.monotonic() + RECOVERY_TIMEOUT_S)
        if waiting:
            self._problems.append(f"{sorted(waiting)} do not load from the pool any more")
            return None
        return round(time.monotonic() - begin_s, 1)

    def _not_loading(self, deadline_s: float) -> set[str]:
        """Servers that have not loaded a page by the deadline."""
        waiting = set(self._world.servers)
        while waiting and time.monotonic() < deadline_s:
            for name in sorted(waiting):
                self._world.servers[name].flush()
                for number in range(RECOVERY_PROMPTS):
                    got = self._client.ask(name, number, 1, stream=False)
                    if got is not None and got.cached_tokens_details.get("storage", 0):
                        waiting.discard(name)
        return waiting

    def result(self) -> dict[str, Any]:
        """All that was found; `problems` is empty if nothing was."""
        stalls = invariants.Stalls.read(
            self._world.pool.faults.stalls(),
            self._plan.lookup_timeout_ms / 1e3,
            self._plan.load_timeout_ms / 1e3,
        )
        problems = self._problems + self._world.problems + self.tally.wrong + self.tally.failed
        return {
            "problems": problems + stalls.too_long,
            "interrupted": self._interrupted,
            "events": {
                "done": len(self._done),
                "planned": len(self.events),
                "store_faults_that_calls_met": self._met,
            },
            "events_by_kind": report.events_by_kind(self._done),
            "requests": report.requests(self.tally),
            "processes": dict(sorted(self._world.counts.items())),
            "scheduler_stalls_ms": report.stalls(stalls),
            "threads_and_fds_at_rest": {
                f"rest {number}": totals for number, totals in enumerate(self._at_rest.resources)
            },
            "seconds_until_the_pool_was_used_again": self._recovered_s,
            "plugin_counters": {
                name: invariants.plugin_totals(server)
                for name, server in self._world.servers.items()
            },
            "schedule": report.schedule(self.events),
        }
