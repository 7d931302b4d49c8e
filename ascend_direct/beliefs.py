# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""What this process remembers about the pool, so that it need not ask again.

`Beliefs`: keys known to be stored. A wrong belief costs a refused load, never wrong bytes.
`Suspects`: keys that are stored but did not come back right; not to be offered for a while.
`LookupMemo`: answers given to waiting requests, which SGLang matches again in every round.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

# A request that never finishes its attempt must not keep its memo for ever.
MAX_MEMOS = 8192
# The longest pause of the breaker: a page that stays bad costs one refused load in this time.
SUSPECT_TTL_S = 30.0
MAX_SUSPECTS = 65_536


class Beliefs:
    """Bounded, ageing set of store keys believed to be in the pool; least recently used go first.

    Args:
        capacity: keys kept; 0 believes nothing.
        ttl_s: how long a key is believed after it was last confirmed by the pool.
    """

    def __init__(
        self, capacity: int, ttl_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._capacity = capacity
        self._ttl_s = ttl_s
        self._clock = clock
        self._expires_s: OrderedDict[str, float] = OrderedDict()
        self._lock = threading.Lock()

    def confirm(self, keys: Iterable[str]) -> None:
        """The pool has these now."""
        if not self._capacity:
            return
        expires_s = self._clock() + self._ttl_s
        with self._lock:
            for key in keys:
                self._expires_s[key] = expires_s
                self._expires_s.move_to_end(key)
            while len(self._expires_s) > self._capacity:
                self._expires_s.popitem(last=False)

    def doubt(self, keys: Iterable[str]) -> None:
        """The pool did not deliver these."""
        with self._lock:
            for key in keys:
                self._expires_s.pop(key, None)

    def prefix(self, keys: Sequence[str]) -> int:
        """How many leading keys are believed stored."""
        now_s = self._clock()
        with self._lock:
            for i, key in enumerate(keys):
                if self._expires_s.get(key, 0.0) <= now_s:
                    return i
        return len(keys)

    def __len__(self) -> int:
        return len(self._expires_s)


class Suspects:
    """Bounded, ageing set of keys that the pool holds and did not deliver right.

    Used by the scheduler thread alone.
    """

    def __init__(
        self,
        capacity: int = MAX_SUSPECTS,
        ttl_s: float = SUSPECT_TTL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._capacity = capacity
        self._ttl_s = ttl_s
        self._clock = clock
        self._until_s: OrderedDict[str, float] = OrderedDict()

    def add(self, keys: Iterable[str]) -> None:
        """These failed now."""
        until_s = self._clock() + self._ttl_s
        for key in keys:
            self._until_s[key] = until_s
            self._until_s.move_to_end(key)
        while len(self._until_s) > self._capacity:
            self._until_s.popitem(last=False)

    def clear_prefix(self, keys: Sequence[str]) -> int:
        """How many leading keys are free of suspicion."""
        now_s = self._clock()
        while self._until_s and next(iter(self._until_s.values())) <= now_s:
            self._until_s.popitem(last=False)
        suspected = (i for i, key in enumerate(keys) if key in self._until_s)
        return next(suspected, len(keys)) if self._until_s else len(keys)

    def __len__(self) -> int:
        return len(self._until_s)


class _Memo(NamedTuple):
    last_hash: str
    asked_pages: int
    hit_pages: int
    expires_s: float


class LookupMemo:
    """Per request: the last lookup and its answer, for a short time.

    A page hash covers all tokens before it: with the last one and the number two questions are the
    same, whatever their length. Used by the scheduler thread alone.
    """

    def __init__(self, ttl_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._ttl_s = ttl_s
        self._clock = clock
        self._memos: OrderedDict[str, _Memo] = OrderedDict()

    def recall(self, rid: str, hashes: Sequence[str]) -> int | None:
        """The answer to the same question asked lately; None if there is none."""
        memo = self._memos.get(rid)
        if memo is None or memo.expires_s <= self._clock():
            return None
        if (memo.last_hash, memo.asked_pages) != (hashes[-1], len(hashes)):
            return None
        return memo.hit_pages

    def note(self, rid: str, hashes: Sequence[str], hit_pages: int) -> None:
        """Remember an answer."""
        self._memos[rid] = _Memo(hashes[-1], len(hashes), hit_pages, self._clock() + self._ttl_s)
        self._memos.move_to_end(rid)
        while len(self._memos) > MAX_MEMOS:
            self._memos.popitem(last=False)

    def forget(self, rid: str) -> None:
        """The request is done or its answer proved wrong."""
        self._memos.pop(rid, None)

    def clear(self) -> None:
        """Forget everything."""
        self._memos.clear()

    def __len__(self) -> int:
        return len(self._memos)
