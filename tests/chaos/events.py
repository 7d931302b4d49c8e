# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""What happens when: a seeded schedule of faults, the same for the same seed and length.

Owns the kinds of events, how often they come and their arguments. Makes nothing happen: that is
world's (processes), aborts' (requests) and faulty_store's (the store boundary).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

SERVERS = ("A", "B")
MEMBERS = 3
# Shorter than the deadlines of the servers under test, about as long, and much longer.
DELAYS_S = (0.05, 0.2, 0.6, 2.0)


@dataclass(frozen=True)
class Event:
    """One thing that goes wrong.

    Attributes:
        at_s: when, from the start of the run.
        track: events of one track come one after the other, tracks are independent.
        target: what is hit: an operation of the store, a server, a member's number.
        mode: how; for `store` a mode of faulty_store.
        lasts_s: how long until it is undone.
    """

    at_s: float
    track: str
    kind: str
    target: str = ""
    mode: str = ""
    lasts_s: float = 0.0


@dataclass(frozen=True)
class Pace:
    """Mean seconds between events of each track, and the longest a process is stopped."""

    store_s: float = 2.6
    requests_s: float = 5.0
    pool_s: float = 30.0
    server_s: float = 270.0
    longest_stop_s: float = 20.0


# What the store boundary can do, per operation; a mode that takes seconds gets them from DELAYS_S.
STORE_MODES = {
    "exists": ("delay", "hang", "raise", "crash", "short", "answer unavailable", "missing"),
    "get": (
        *("delay", "hang", "raise", "crash", "short", "torn", "answer failed", "missing"),
        *("answer mismatch", "answer unavailable", "some missing", "some failed"),
    ),
    "put": (
        *("delay", "hang", "raise", "crash", "short", "answer full", "answer failed"),
        *("some full", "some unavailable"),
    ),
}
REQUEST_KINDS = ("abort_queued", "abort_prefill", "abort_decode", "disconnect", "flush")
POOL_KINDS = ("kill_meta_service", "kill_member", "stop_meta_service", "stop_member")


def schedule(
    seed: int, length_s: float, pace: Pace, tracks: Sequence[str], servers: Sequence[str] = SERVERS
) -> list[Event]:
    """All events of a run, in order of time."""
    makers: dict[str, tuple[float, Callable[[random.Random], Iterator[Event]]]] = {
        "store": (pace.store_s, _store),
        "requests": (pace.requests_s, lambda dice: _requests(dice, servers)),
        "pool": (pace.pool_s, lambda dice: _pool(dice, pace.longest_stop_s)),
        "server": (pace.server_s, lambda dice: _server(dice, servers)),
    }
    events = []
    for track in tracks:
        gap_s, make = makers[track]
        # A generator of its own, so that another track's pace does not change this one's events.
        dice = random.Random(f"{seed} {track}")
        at_s = min(gap_s * dice.uniform(0.2, 0.6), length_s * 0.15)
        for event in make(dice):
            if at_s >= length_s:
                break
            events.append(replace(event, at_s=round(at_s, 2)))
            at_s += gap_s * dice.uniform(0.5, 1.5)
    return sorted(events, key=lambda event: event.at_s)


def _dealt(dice: random.Random, kinds: list[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Kinds from a shuffled deck, over and over: a short run meets each of them too."""
    while True:
        yield from dice.sample(kinds, len(kinds))


def _store(dice: random.Random) -> Iterator[Event]:
    deck = [(operation, mode) for operation, modes in STORE_MODES.items() for mode in modes]
    for operation, mode in _dealt(dice, deck):
        if mode in ("delay", "torn"):
            mode = f"{mode} {dice.choice(DELAYS_S)}"
        yield Event(0.0, "store", "store", operation, mode, round(dice.uniform(0.3, 1.6), 2))


def _requests(dice: random.Random, servers: Sequence[str]) -> Iterator[Event]:
    for kind, server in _dealt(dice, [(k, s) for k in REQUEST_KINDS for s in servers]):
        yield Event(0.0, "requests", kind, server)


def _pool(dice: random.Random, longest_s: float) -> Iterator[Event]:
    first = [(kind, "") for kind in POOL_KINDS]
    # Later on MetaService dies less often: getting over it can take restarts of everyone.
    rest = _dealt(dice, [*first, *(kind for kind in first * 2 if kind[0] != "kill_meta_service")])
    for kind, _ in itertools.chain(dice.sample(first, len(first)), rest):
        target = str(dice.randrange(MEMBERS)) if kind.endswith("member") else ""
        lasts_s = dice.uniform(2.0, longest_s) if kind.startswith("stop") else dice.uniform(0, 4)
        yield Event(0.0, "pool", kind, target, "", round(lasts_s, 2))


def _server(dice: random.Random, servers: Sequence[str]) -> Iterator[Event]:
    deck = [(server, operation) for server in servers for operation in ("put", "get")]
    for server, operation in _dealt(dice, deck):
        yield Event(0.0, "server", "kill_server", server, f"{operation} {dice.uniform(0, 3):.1f}")
