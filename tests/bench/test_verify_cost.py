# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""scripts/bench/verify_cost: a small run. Its figures need a quiet machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_a_small_run_shows_puts_and_gets_of_each_mode() -> None:
    command = [sys.executable, "-m", "bench.verify_cost", "--store", "local"]
    done = subprocess.run(
        [*command, "--pages", "2", "--rounds", "2"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "scripts")},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    title, *lines = done.stdout.splitlines()
    assert title.startswith("local, 2 pages of ")
    shown = [line.split()[:3] for line in lines]
    assert shown == [[way, "verify", m] for way in ("put", "get") for m in ("off", "sample", "all")]
