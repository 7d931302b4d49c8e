# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""How much of this machine programs take that have nothing to do with the measurement.

Owns that one figure. On a machine that is not quiet, times are longer than the costs say.
"""

from __future__ import annotations

import os
import time

import psutil  # type: ignore[import-untyped]


class Others:
    """From `__init__` to `percent`: CPU time of all programs but this one and those it started."""

    def __init__(self) -> None:
        self._start = self._now()

    def percent(self) -> float:
        """Of all cores' time; 0 where everything was ours."""
        wall_s, all_s, own_s = (b - a for a, b in zip(self._start, self._now(), strict=True))
        cores_s = max(wall_s * (os.cpu_count() or 1), 1e-9)
        return 100 * max(0.0, all_s - own_s) / cores_s

    def _now(self) -> tuple[float, float, float]:
        times = psutil.cpu_times()
        own_s = 0.0
        me = psutil.Process()
        for process in (me, *me.children(recursive=True)):
            try:
                used = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            own_s += used.user + used.system
        idle_s = times.idle + getattr(times, "iowait", 0.0)
        return time.monotonic(), sum(times[:8]) - idle_s, own_s
