# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""`pool stats`, `pool ls` and `pool bench` against a real MetaService and member."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from ascend_direct.cli.main import app
from ascend_direct.store.base import PageStatus
from tests.contract.conftest import NewStore, Pool
from tests.contract.store_contract import new_keys

pytestmark = [pytest.mark.memcache, pytest.mark.multi]
NAMESPACE = "00112233445566aa"


def ask(pool: Pool, command: str) -> dict[str, Any]:
    config = json.dumps({"memcache": pool.section})
    result = CliRunner().invoke(app, ["pool", command, "--json", "--config", config])
    assert result.exit_code == 0, result.output
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


def test_what_was_stored_is_counted_in_its_namespace(pool: Pool, new_store: NewStore) -> None:
    arena = pool.arena()
    client = new_store(arena)
    before = ask(pool, "stats")
    keys = [f"ad1:{NAMESPACE}:-:{key}" for key in new_keys(5)]
    pages = arena.place(5, (96, 64), np.random.default_rng(5))
    assert client.put(keys, pages) == [PageStatus.OK] * 5
    after = ask(pool, "stats")
    assert after["keys"] - before["keys"] == 5
    assert after["members"] >= 1
    assert after["used_bytes"] > 0
    assert sum(s["total_bytes"] for s in after["segments"]) == after["total_bytes"] > 0
    (ours,) = (n for n in ask(pool, "ls")["namespaces"] if n["namespace"] == NAMESPACE)
    assert ours == {"namespace": NAMESPACE, "objects": 5, "parts": {"-": 5}}


def test_bench_measures_a_real_pool_and_leaves_nothing_in_it(pool: Pool) -> None:
    before = ask(pool, "stats")["keys"]
    config = json.dumps({"memcache": pool.section})
    command = [sys.executable, "-m", "ascend_direct.cli.main", "pool", "bench", "--json"]
    command += ["--config", config, "--seconds", "0.5", "--size", "16MB", "--page-size", "256KB"]
    done = subprocess.run(
        command,
        env={**os.environ, **pool.meta.environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["emulated"]
    assert found["same_bytes"]
    assert found["put"]["calls"] > 0 < found["get"]["calls"]
    assert found["removed"] == found["pages_per_call"] * found["put"]["calls"]
    assert ask(pool, "stats")["keys"] == before
