# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Runs the commands of an installation: output into a log, signs of life, advice where one fails.

Owns the child process and its end. Standard library only: it runs before anything is installed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_TAIL_LINES = 25
_STILL_EVERY_S = 20.0

_HINTS = (
    ("No space left on device", "free some disk space (about 3 GB are needed)"),
    ("No matching distribution found", "pip's index lacks this version: check `pip config list`"),
    ("Temporary failure in name resolution", "no network: check the connection and the proxy"),
    (
        "Connection",
        "pip's index cannot be reached: check the network, the proxy, `pip config list`",
    ),
    ("Read timed out", "the network is slow: try again, or set PIP_DEFAULT_TIMEOUT=300"),
    ("CERTIFICATE_VERIFY_FAILED", "set PIP_CERT to your site's certificate bundle"),
)


class InstallError(RuntimeError):
    """The environment cannot be made; the message says why and what to do."""


class Runner:
    """Runs the commands of a step: output into the log, progress on the terminal."""

    def __init__(self, log: Path, *, verbose: bool) -> None:
        self._log = log
        self._verbose = verbose

    def __call__(self, command: Sequence[str], *, may_fail: bool = False) -> None:
        with self._log.open("ab") as log:
            log.write(f"\n$ {' '.join(command)}\n".encode())
            log.flush()
            start = log.tell()
            output = None if self._verbose else log
            # A session of its own: on Ctrl-C we choose the signal, pip undoes what it began.
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT if output else None,
                env=_pip_environment(),
                cwd=self._log.parent,
                start_new_session=True,
            )
            try:
                code = self._wait(child)
            except BaseException:
                _end(child)
                raise
        if code and not may_fail:
            raise InstallError(self._explain(command, code, start))

    def _wait(self, child: subprocess.Popen[bytes]) -> int:
        started = reported = time.monotonic()
        while child.poll() is None:
            time.sleep(0.1)
            now = time.monotonic()
            if now - reported >= _STILL_EVERY_S:
                reported = now
                print(f"      ... {now - started:.0f} s", flush=True)
        return child.returncode

    def _explain(self, command: Sequence[str], code: int, start: int) -> str:
        with self._log.open("rb") as log:
            log.seek(start)
            text = log.read().decode(errors="replace")
        tail = "\n".join(f"    {line}" for line in text.splitlines()[-_TAIL_LINES:])
        advice = [advice for sign, advice in _HINTS if sign in text][:1]
        advice.append("then run the same command again: it goes on where it stopped")
        return (
            f"`{' '.join(command[1:])}` ended with code {code}:\n{tail}\n"
            f"What to do: {'; '.join(advice)}.\nThe whole output: {self._log}"
        )


def _pip_environment() -> dict[str, str]:
    drop = {"PYTHONHOME", "PYTHONPATH", "PIP_TARGET", "PIP_USER", "PIP_REQUIRE_VIRTUALENV"}
    kept = {name: value for name, value in os.environ.items() if name not in drop}
    return {**kept, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}


def _end(child: subprocess.Popen[bytes]) -> None:
    for number, patience_s in ((signal.SIGINT, 30), (signal.SIGKILL, 30)):
        if child.poll() is None:
            os.killpg(child.pid, number)
            try:
                child.wait(patience_s)
            except subprocess.TimeoutExpired:
                continue
