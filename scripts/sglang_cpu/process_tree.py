# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""The processes of one server: who they are, what memory they take, how they end.

Knows only the session that its root leads, so it can never reach a process someone else started.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import psutil  # type: ignore[import-untyped]

_PEAK = re.compile(r"^VmHWM:\s+(\d+) kB$", re.MULTILINE)
_GONE = (psutil.NoSuchProcess, psutil.AccessDenied, OSError)


class ProcessTree:
    """A session leader and everything in its session, even what outlives the leader."""

    def __init__(self, root_pid: int) -> None:
        """`root_pid` must be alive, or not yet waited for, and lead its own session."""
        self._root_pid = root_pid
        self._root_created = _create_time(root_pid)
        self._is_over = False
        self._seen: dict[int, psutil.Process] = {}
        self._peak_rss_bytes = 0

    def processes(self) -> list[psutil.Process]:
        """The live ones. A psutil handle remembers the start time, so a reused pid is not ours."""
        for process in self._candidates():
            self._seen.setdefault(process.pid, process)
        self._seen = {pid: p for pid, p in self._seen.items() if _is_alive(p)}
        return list(self._seen.values())

    def _candidates(self) -> list[psutil.Process]:
        # A session id is not reused while a member lives, but it may be once all have ended.
        if self._is_over or _create_time(self._root_pid) not in (None, self._root_created):
            return []
        found: list[psutil.Process] = []
        for pid in psutil.pids():
            try:
                if os.getsid(pid) == self._root_pid:
                    process = psutil.Process(pid)
                    found += [process, *process.children(recursive=True)]
            except _GONE:
                continue
        return found

    def peak_rss_bytes(self) -> int:
        """Sum of the peaks of the live processes, kept from the last call once they are gone.

        An upper bound: pages that the processes share are counted once for each of them.
        """
        peak = sum(_peak_rss_bytes(process.pid) for process in self.processes())
        self._peak_rss_bytes = max(self._peak_rss_bytes, peak)
        return self._peak_rss_bytes

    def pss_bytes(self) -> int:
        """Memory in use now, shared pages split between those who share them."""
        total = 0
        for process in self.processes():
            try:
                total += process.memory_full_info().pss
            except _GONE:
                continue
        return total

    def kill(self, timeout_s: float = 10.0) -> None:
        """SIGKILL all; twice, because a process may have forked while the first list was made."""
        self.peak_rss_bytes()
        for _ in range(2):
            processes = self.processes()
            for process in processes:
                try:
                    process.kill()
                except _GONE:
                    continue
            psutil.wait_procs(processes, timeout=timeout_s)
        self._is_over = not self.processes()


def _create_time(pid: int) -> float | None:
    try:
        return float(psutil.Process(pid).create_time())
    except _GONE:
        return None


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except _GONE:
        return False


def _peak_rss_bytes(pid: int) -> int:
    try:
        match = _PEAK.search(Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return int(match.group(1)) * 1024 if match else 0
