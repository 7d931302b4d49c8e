# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""`pool stats` and `pool ls` read what a real MetaService answers."""

from __future__ import annotations

import json
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
