# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""What a cache holds, the least recently used unit first.

Owns the bookkeeping of room. In which order a tier is used is the simulation's: SGLang's tree gives
up the ends of prefixes first, MemCache what was read or written longest ago.
"""

from __future__ import annotations

from collections import OrderedDict
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
        # A plain dict would look through all that was taken out for its oldest entry.
        self.held: OrderedDict[int, int] = OrderedDict()

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
        to_end = held.move_to_end
        for unit in units:
            if unit in held:
                to_end(unit)
            else:
                held[unit] = unit_tokens
                added += unit_tokens
        self.used_tokens += added
        return added

    def use_one(self, unit: int, tokens: int) -> int:
        """`use` of one unit of another size."""
        return self.use((unit,), tokens)

    def make_room(self) -> None:
        """Give up units until what is held fits."""
        if self.used_tokens > self.capacity_tokens:
            oldest, used = self.held.popitem, self.used_tokens
            while used > self._evict_to_tokens:
                used -= oldest(last=False)[1]
            self.evicted_tokens += self.used_tokens - used
            self.used_tokens = used
        self.peak_tokens = max(self.peak_tokens, self.used_tokens)
