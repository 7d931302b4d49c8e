# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""`ascend-direct doctor` on a real pool: nothing fails; when it stands still, doctor says so."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import Any

import pytest
from two_instances.cluster import MemcachePool

pytestmark = [pytest.mark.memcache, pytest.mark.sglang, pytest.mark.timeout(400)]


def doctor(pool: MemcachePool, *arguments: str) -> tuple[int, dict[str, Any]]:
    environment = {**os.environ, **pool.environment(), "SGLANG_USE_CPU_ENGINE": "1"}
    done = subprocess.run(
        [
            *(sys.executable, "-W", "ignore", "-m", "ascend_direct.cli.main", "doctor", "--json"),
            *("--config", json.dumps(pool.options()), *arguments),
        ],
        env={name: value for name, value in environment.items() if name != "SGLANG_PLUGINS"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout, done.stderr[-2000:]
    answer = json.loads(done.stdout)
    return done.returncode, {check["name"]: check for check in answer["checks"]}


def test_a_real_pool_is_sound_and_one_that_stands_still_is_not() -> None:
    pool = MemcachePool(member_size="64MB")
    try:
        pool.start()
        code, found = doctor(pool)
        assert code == 0, found
        assert found["sglang"]["status"] == "ok"
        assert "1 in the pool" in found["members"]["found"]
        assert found["round trip"]["status"] == "ok"
        assert pool.stored_pages() == 0, "the page of the trial was left"
        for process in (pool.meta, *pool.members):
            process.send_signal(signal.SIGSTOP)
        try:
            code, found = doctor(pool, "--quick")
        finally:
            for process in (pool.meta, *pool.members):
                process.send_signal(signal.SIGCONT)
        assert code == 3, found
        assert found["members"]["status"] == "failure"
    finally:
        pool.stop()
