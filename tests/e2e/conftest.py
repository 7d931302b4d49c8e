# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Real servers, shared by tests of one configuration; each test leaves them at rest, zero leaks."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sglang_cpu.models import make_model
from two_instances.cluster import Cluster

from .farm import CHECKS, SETUPS, Farm, Watch

HERE = Path(__file__).parent
TEST_TIMEOUT_S = 900


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark them, and bring those of one configuration together: starting a pair is what costs."""
    ours = [place for place, item in enumerate(items) if HERE in item.path.parents]
    for place in ours:
        items[place].add_marker("e2e")
        items[place].add_marker("sglang")
        items[place].add_marker(pytest.mark.timeout(TEST_TIMEOUT_S))
        if _setup(items[place]) not in (None, "faults"):
            items[place].add_marker("memcache")
    order = [*SETUPS, None]
    ordered = sorted((items[place] for place in ours), key=lambda i: order.index(_setup(i)))
    for place, item in zip(ours, ordered, strict=True):
        items[place] = item


def _setup(item: pytest.Item) -> str | None:
    """The configuration a test names by `cluster`'s parameter; None: it brings its own servers."""
    callspec = getattr(item, "callspec", None)
    return callspec.params.get("cluster") if callspec else None


@pytest.fixture(scope="session")
def say(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Writes a progress line that is seen while the test runs."""
    terminal = request.config.pluginmanager.get_plugin("terminalreporter")
    capture = request.config.pluginmanager.get_plugin("capturemanager")
    lock = threading.Lock()

    def write(line: str) -> None:
        with lock, capture.global_and_fixture_disabled():
            terminal.write_line(f"    {line}")
            terminal.flush()

    return write


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "gqa", "gqa")


@pytest.fixture(scope="session")
def farm(
    model: Path, tmp_path_factory: pytest.TempPathFactory, say: Callable[[str], None]
) -> Iterator[Farm]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CHECKS.items():
            patch.setenv(name, value)
        farm = Farm(model, tmp_path_factory.mktemp("servers"), say)
        try:
            yield farm
        finally:
            farm.clear()


@pytest.fixture
def cluster(request: pytest.FixtureRequest, farm: Farm) -> Iterator[Cluster]:
    """Servers A and B on one pool, in the configuration named by the parameter."""
    cluster = farm.cluster(request.param)
    watch = Watch(list(cluster.servers.values()))
    yield cluster
    watch.check()


@pytest.fixture
def no_servers(farm: Farm) -> None:
    """Nothing else is up: the test starts servers of its own."""
    farm.clear()


@pytest.fixture
def dice(request: pytest.FixtureRequest) -> random.Random:
    """Prompts of a test are the same in each run and of no other test."""
    return random.Random(request.node.nodeid)
