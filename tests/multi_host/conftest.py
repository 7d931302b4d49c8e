# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""One pool over four hosts: MetaService on one, a member and a client on each of the others."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.multi_host.hosts import Network
from tests.multi_host.machine import META_PORTS, Machine, meta_service

import ascend_emulation  # isort: skip

HERE = Path(__file__).parent
MACHINES = 3
START_TIMEOUT_S = 60.0
TEST_TIMEOUT_S = 600


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    present = ascend_emulation.real_driver_present()
    for item in items:
        if HERE in item.path.parents:
            for need in ("memcache", "multi", "netns"):
                item.add_marker(need)
            item.add_marker(pytest.mark.timeout(TEST_TIMEOUT_S))
            reason = "the emulation refuses to start where an Ascend driver is present"
            item.add_marker(pytest.mark.skipif(present is not None, reason=reason))


@pytest.fixture(scope="module")
def machines() -> Iterator[list[Machine]]:
    """The hosts that have a member and a client, all linked."""
    with ExitStack() as undo:
        folder = ascend_emulation.private_run_dir()
        undo.callback(shutil.rmtree, folder, ignore_errors=True)
        first, *others = undo.enter_context(Network(1 + MACHINES)).hosts
        meta = undo.enter_context(meta_service(first, folder / "meta"))
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not all(first.listens(port) for port in META_PORTS):
            assert time.monotonic() < deadline_s, "MetaService does not listen"
            time.sleep(0.05)
        machines = [
            Machine(host, folder / f"host{n}", meta.section) for n, host in enumerate(others, 1)
        ]
        for machine in machines:
            undo.callback(machine.power_off)
        with ThreadPoolExecutor(MACHINES) as pool:
            list(pool.map(Machine.start, machines))
        yield machines
