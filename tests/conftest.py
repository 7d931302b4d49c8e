# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""One rule: a test that needs something says so with a marker; ``--require`` forbids the skip."""

from __future__ import annotations

import importlib.util

import pytest


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


PROBES = {
    "npu": lambda: _installed("torch_npu"),
    "memcache": lambda: _installed("memcache_hybrid"),
    "sglang": lambda: _installed("sglang"),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require",
        default="",
        help="comma-separated needs (npu,memcache,sglang) whose absence is a failure, not a skip",
    )


def pytest_runtest_setup(item: pytest.Item) -> None:
    required = {need for need in item.config.getoption("--require").split(",") if need}
    for need, present in PROBES.items():
        if item.get_closest_marker(need) and not present():
            outcome = pytest.fail if need in required else pytest.skip
            outcome(f"needs {need}, which is not here")
