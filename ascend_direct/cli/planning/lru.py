# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""What a cache holds, the least recently used unit first.

Owns the bookkeeping of room. In which order a tier is used is the simulation's: SGLang's tree gives
up the ends of prefixes first, MemCache what was read or written longest ago.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class Lru:
    """Units and their tokens.

    Args:
        capacity_tokens: never exceeded.
        evict_to_tokens: how far an eviction goes once there is no room; MemCache makes more room
            than it needs.
    """

    def __init__(self, capacity_tokens: float, evict_to_tokens: float | None = None) -> None:
        self.capacity_tokens = capacity_tokens
        self.used_tokens = 0
        self.peak_tokens = 0
        self.evicted_tokens = 0
        self._evict_to_tokens = capacity_tokens if evict_to_tokens is None else evict_to_tokens
        # A dict keeps insertion order, and taking out and putting back is faster than an
        # OrderedDict's move_to_end.
        self.held: dict[int, int] = {}

    def matched(self, units: Sequence[int], start: int = 0) -> int:
        """Where the run of units that are held ends."""
        held = self.held
        for place in range(start, len(units)):
            if units[place] not in held:
                return place
        return len(units)

    def use(self, units: Iterable[int], unit_tokens: int) -> int:
        """Units become the most recently used, in this order, and are added where they are not
        held. Tokens added; room is made by `make_room`."""
        held, added = self.held, 0
        for unit in units:
            tokens = held.pop(unit, 0)
            if not tokens:
                tokens = unit_tokens
                added += tokens
            held[unit] = tokens
        self.used_tokens += added
        return added

    def use_one(self, unit: int, tokens: int) -> int:
        """`use` of one unit of another size."""
        return self.use((unit,), tokens)

    def make_room(self) -> None:
        """Give up units until what is held fits."""
        if self.used_tokens > self.capacity_tokens:
            held, used = self.held, self.used_tokens
            limit = self._evict_to_tokens
            gone = []
            for unit, tokens in held.items():
                if used <= limit:
                    break
                gone.append(unit)
                used -= tokens
            for unit in gone:
                del held[unit]
            self.evicted_tokens += self.used_tokens - used
            self.used_tokens = used
        self.peak_tokens = max(self.peak_tokens, self.used_tokens)
