# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""How long the plugin keeps a scheduler from its work, seen from inside the scheduler's process.

Owns one thread that looks at the main thread's stack and notes how long it stays in one call of
`ascend_direct.integration`. It measures nothing else, so work of SGLang itself, however slow the
machine, is no stall. Runs in servers, beside faulty_store.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from types import FrameType

PERIOD_S = 0.005
# Shorter ones would fill the disk and stall nobody.
SHORTEST_S = 0.02
PACKAGE = "/ascend_direct/integration/"


class StallProbe:
    """Appends `call stall_s late_s` per call to a file.

    `late_s` is how much later than planned the probe itself woke up during the call: time in which
    the machine ran neither, so it is not the plugin's.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._scheduler = threading.main_thread().ident
        self._call: FrameType | None = None
        self._since_s = 0.0
        self._late_s = 0.0

    def start(self) -> None:
        threading.Thread(target=self._watch, name="stall-probe", daemon=True).start()

    def _watch(self) -> None:
        while self._outermost() is not None:  # the server is still being built
            time.sleep(PERIOD_S)
        before_s = time.monotonic()
        while True:
            time.sleep(PERIOD_S)
            now_s = time.monotonic()
            late_s = now_s - before_s - PERIOD_S
            self._look(before_s, now_s, late_s)
            before_s = now_s

    def _look(self, before_s: float, now_s: float, late_s: float) -> None:
        # A call under way keeps its frame object; a new call of the same function gets another.
        call = self._outermost()
        if call is self._call:
            self._late_s += late_s
            return
        if self._call is not None:
            stall_s = before_s - self._since_s
            if stall_s >= SHORTEST_S:
                with self._path.open("a") as stalls:
                    name = self._call.f_code.co_name
                    stalls.write(f"{name} {stall_s:.4f} {self._late_s:.4f}\n")
        self._call, self._since_s, self._late_s = call, now_s, late_s

    def _outermost(self) -> FrameType | None:
        """The outermost frame of the plugin's integration code on the scheduler's stack."""
        found, frame = None, sys._current_frames().get(self._scheduler or 0)
        # The stack of a running thread changes while it is walked; its end may be no frame at all.
        while isinstance(frame, FrameType):
            if PACKAGE in frame.f_code.co_filename:
                found = frame
            frame = frame.f_back
        return found
