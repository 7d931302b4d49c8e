# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""`admission: cost`: from how many tokens on a load is faster than computing them.

Owns what is learnt on line of both costs, and the rule. Both are lines, seconds = fixed + slope ·
tokens, fitted by least squares with older samples counting less. Computing's fixed part is paid
either way, for the last token is always computed; so a load of n tokens pays when
    load.fixed + load.slope · n < compute.slope · n

Nothing is refused before both lines have `ENOUGH` samples. A line cannot be thrown by one sample
(`CLIP`), the threshold moves only when it has changed for good (`BAND`), and one request in
`TRIAL_ONE_IN` is loaded all the same, or a pool that was slow once would never be used again.
Ranks learn each for themselves; SGLang offers what all of them admit. Trials are chosen by the
request's name, so that all ranks make the same. Who measures is integration/costs.
"""

from __future__ import annotations

import zlib

ENOUGH = 8
FADE = 0.98
CLIP = 4.0
BAND = 1.25
TRIAL_ONE_IN = 16
# More tokens than any prompt has: loading never pays.
NEVER_TOKENS = 1 << 30


class CostLine:
    """A line through (tokens, seconds), the newest samples counting most."""

    def __init__(self) -> None:
        self.samples = 0
        self._n = self._x = self._y = self._xx = self._xy = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        """One measurement, at most `CLIP` times what was expected once enough is known."""
        if self.samples >= ENOUGH:
            fixed, slope = self.fit()
            seconds = min(seconds, CLIP * (fixed + slope * tokens))
        self.samples += 1
        terms = (1.0, tokens, seconds, tokens * tokens, tokens * seconds)
        sums = (self._n, self._x, self._y, self._xx, self._xy)
        self._n, self._x, self._y, self._xx, self._xy = (
            FADE * total + term for total, term in zip(sums, terms, strict=True)
        )

    def fit(self) -> tuple[float, float]:
        """(fixed seconds, seconds per token), neither negative. Samples of one length do not tell
        them apart: all is then taken for slope."""
        mean_slope = self._y / max(self._x, 1e-9)
        spread = self._n * self._xx - self._x * self._x
        if spread <= 1e-3 * self._n * self._xx:
            return 0.0, mean_slope
        slope = (self._n * self._xy - self._x * self._y) / spread
        slope = min(max(slope, 0.0), mean_slope)
        return (self._y - slope * self._x) / self._n, slope


class Admission:
    """The rule. Used by the scheduler thread alone."""

    def __init__(self) -> None:
        self.loading = CostLine()
        self.computing = CostLine()
        self._least_tokens = 0

    @property
    def least_tokens(self) -> int:
        """A shorter load costs more than it saves; 0 until enough is known."""
        return self._least_tokens

    def floor_tokens(self, rid: str) -> int:
        """`least_tokens`, or 0 where it is this request's turn to try."""
        return 0 if zlib.crc32(rid.encode()) % TRIAL_ONE_IN == 0 else self._least_tokens

    def loaded(self, tokens: int, seconds: float) -> bool:
        """A load has landed. Returns whether `least_tokens` has changed."""
        self.loading.add(tokens, seconds)
        return self._decide()

    def computed(self, tokens: int, seconds: float) -> bool:
        """A prefill batch has been computed. Returns whether `least_tokens` has changed."""
        self.computing.add(tokens, seconds)
        return self._decide()

    def _decide(self) -> bool:
        if min(self.loading.samples, self.computing.samples) < ENOUGH:
            return False
        fixed_s, load_s = self.loading.fit()
        saved_s = self.computing.fit()[1] - load_s
        least = min(NEVER_TOKENS, fixed_s / saved_s) if saved_s > 0 else NEVER_TOKENS
        if self._least_tokens / BAND <= least <= self._least_tokens * BAND:
            return False
        changed = int(least) != self._least_tokens
        self._least_tokens = int(least)
        return changed
