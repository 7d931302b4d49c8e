# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Every test here needs SGLang, and leaves environment and logging as they were."""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent

if importlib.util.find_spec("sglang") is None:
    collect_ignore_glob = ["test_*.py"]
# Read by SGLang while it is imported.
os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("sglang")


@pytest.fixture(scope="session")
def _sglang_imported() -> None:
    """A first resolution, which imports much that warns: SGLang, transformers, torch."""
    from ..integration.launching import command_line, resolved

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        resolved(command_line())


@pytest.fixture(autouse=True)
def _as_it_was(_sglang_imported: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """SGLang sets variables while it resolves, and replaces the root logger's handlers."""
    root = logging.getLogger()
    environment, handlers, level = dict(os.environ), list(root.handlers), root.level
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)
    root.handlers[:] = handlers
    root.setLevel(level)
