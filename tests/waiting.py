# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Waiting in tests for what another thread, process or host does."""

from __future__ import annotations

import time
from collections.abc import Callable


def eventually(
    condition: Callable[[], bool],
    timeout_s: float = 10.0,
    what: str = "it",
    poll_s: float = 0.002,
) -> None:
    """Return once the condition holds; fail when the time is over first."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"{what} has not happened within {timeout_s:g} s"
        time.sleep(poll_s)
