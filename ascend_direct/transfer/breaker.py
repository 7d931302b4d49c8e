# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Circuit breaker: stop asking a pool that does not answer, probe it now and then.

Owns the decision, not the calls. closed → open after a run of failures → half-open after a
jittered pause, one probe → closed or open for longer. Thread-safe; time comes from the caller.
"""

from __future__ import annotations

import random
import threading


class Breaker:
    """Says whether a pool call may be made.

    Args:
        failures_to_open: calls in a row that must fail.
        first_pause_s, longest_pause_s: pause before a probe; doubles with each failed probe.
    """

    def __init__(
        self,
        failures_to_open: int = 3,
        first_pause_s: float = 0.5,
        longest_pause_s: float = 30.0,
        seed: int | None = None,
    ) -> None:
        self._failures_to_open = failures_to_open
        self._first_pause_s = first_pause_s
        self._longest_pause_s = longest_pause_s
        # Jitter keeps the servers of a fleet from probing a returning pool all at once.
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._failures = 0
        self._pause_s = first_pause_s
        self._closed_again_at_s: float | None = None

    @property
    def is_open(self) -> bool:
        """Whether calls are being refused or only probed."""
        return self._closed_again_at_s is not None

    def due(self, now_s: float) -> bool:
        """Whether `allow` would say yes."""
        closed_again_at_s = self._closed_again_at_s
        return closed_again_at_s is None or now_s >= closed_again_at_s

    def allow(self, now_s: float) -> bool:
        """Whether to call now. While open, true once per pause: that call is the probe."""
        with self._lock:
            if self._closed_again_at_s is None:
                return True
            if now_s < self._closed_again_at_s:
                return False
            self._closed_again_at_s = now_s + self._pause_s
            return True

    def succeeded(self) -> None:
        """A call answered in time."""
        with self._lock:
            self._failures = 0
            self._pause_s = self._first_pause_s
            self._closed_again_at_s = None

    def failed(self, now_s: float) -> bool:
        """A call failed as a whole or came too late. Returns True when this opened the breaker."""
        with self._lock:
            self._failures += 1
            was_open = self._closed_again_at_s is not None
            if not was_open and self._failures < self._failures_to_open:
                return False
            if was_open:
                self._pause_s = min(self._pause_s * 2, self._longest_pause_s)
            pause_s = self._pause_s * self._random.uniform(0.75, 1.25)
            self._closed_again_at_s = now_s + pause_s
            return not was_open
