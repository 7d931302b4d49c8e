# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Which instance a request goes to.

Owns the policies. None sees more than a router in front of servers could: what it sent where, and
how many prompt tokens are still unanswered.
"""

from __future__ import annotations

from typing import Protocol

from ascend_direct.cli.planning.traces import Request

POLICIES = ("round-robin", "least-loaded", "prefix")
# As SGLang's router: a prefix is left when its instance has this much more to do than the mean.
TOO_BUSY_FACTOR = 1.5
TOO_BUSY_TOKENS = 16_384


class Router(Protocol):
    """A policy, with its memory."""

    def choose(self, request: Request, waiting_tokens: list[int]) -> int:
        """Number of an instance; `waiting_tokens` are of each, unanswered."""
        ...


class RoundRobin:
    """One after the other."""

    def __init__(self) -> None:
        self._next = 0

    def choose(self, request: Request, waiting_tokens: list[int]) -> int:
        chosen = self._next
        self._next = (chosen + 1) % len(waiting_tokens)
        return chosen


class LeastLoaded:
    """Whoever has the fewest tokens to do; among equals one after the other."""

    def __init__(self) -> None:
        self._next = 0

    def choose(self, request: Request, waiting_tokens: list[int]) -> int:
        least = min(waiting_tokens)
        try:
            chosen = waiting_tokens.index(least, self._next)
        except ValueError:
            chosen = waiting_tokens.index(least)
        self._next = (chosen + 1) % len(waiting_tokens)
        return chosen


class Prefix:
    """Where the longest part of the prompt went last, unless much is waiting there."""

    def __init__(self) -> None:
        self._last: dict[int, int] = {}
        self._total_tokens = 0
        self._fallback = LeastLoaded()

    def choose(self, request: Request, waiting_tokens: list[int]) -> int:
        chosen = next(
            (self._last[unit] for unit in reversed(request.units) if unit in self._last), None
        )
        if chosen is not None:
            mean = sum(waiting_tokens) / len(waiting_tokens)
            if waiting_tokens[chosen] > TOO_BUSY_FACTOR * mean + TOO_BUSY_TOKENS:
                chosen = None
        if chosen is None:
            chosen = self._fallback.choose(request, waiting_tokens)
        for unit in (*request.units, *request.answer_units):
            self._last[unit] = chosen
        return chosen


def router(policy: str) -> Router:
    """A fresh router of one of POLICIES."""
    made: dict[str, type[Router]] = {
        "round-robin": RoundRobin,
        "least-loaded": LeastLoaded,
        "prefix": Prefix,
    }
    return made[policy]()
