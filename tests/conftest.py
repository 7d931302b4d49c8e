# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""One rule: a test that needs something says so with a marker; ``--require`` forbids the skip."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts.sglang_cpu.install import TRITON_FOLDER
from tests.multi_host import hosts


def _lacks(module: str) -> Callable[[], str | None]:
    return lambda: None if importlib.util.find_spec(module) else f"{module} is not installed"


def _no_mooncake() -> str | None:
    try:
        importlib.import_module("mooncake.engine")
    except ImportError as error:
        return (
            f"Mooncake cannot be loaded ({error}): see the output of scripts/sglang_cpu/install.py"
        )
    return None


def _no_triton() -> str | None:
    if Path(sys.prefix, TRITON_FOLDER).is_dir():
        return None
    return "triton-ascend is not installed: scripts/sglang_cpu/install.py says why"


# What a marker needs: why it is not to be had here, or None.
PROBES: dict[str, Callable[[], str | None]] = {
    "npu": _lacks("torch_npu"),
    "memcache": _lacks("memcache_hybrid"),
    "sglang": _lacks("sglang"),
    "netns": hosts.why_not,
    "pd": _no_mooncake,
    "triton": _no_triton,
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require",
        default="",
        help=f"comma-separated needs ({','.join(PROBES)}); a missing one fails, not skips",
    )


def pytest_runtest_setup(item: pytest.Item) -> None:
    required = {need for need in item.config.getoption("--require").split(",") if need}
    for need, why_not in PROBES.items():
        if item.get_closest_marker(need) and (reason := why_not()):
            outcome = pytest.fail if need in required else pytest.skip
            outcome(f"needs {need}: {reason}")
