# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Instances that share a pool; each test ends at rest, with zero leaks and no thread left."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent

if importlib.util.find_spec("sglang") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    # Read by SGLang while it is imported.
    os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import sglang.srt.managers.schedule_batch
        import sglang.srt.managers.scheduler  # noqa: F401
        import torch
    torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("sglang")


if importlib.util.find_spec("sglang") is not None:
    from ..fakes.memory_store import MemoryPool
    from .audit import check_all_evictable
    from .instance import Instance
    from .oracle import Ledger

    @pytest.fixture
    def shared() -> MemoryPool:
        return MemoryPool()

    @pytest.fixture
    def ledger() -> Ledger:
        return Ledger()

    @pytest.fixture
    def make(shared: MemoryPool, ledger: Ledger) -> Iterator[Callable[..., Instance]]:
        """Build instances; at the end of the test each is drained, audited and closed."""
        made: list[Instance] = []

        def build(**options: Any) -> Instance:
            made.append(Instance(shared, ledger, **options))
            return made[-1]

        yield build
        for instance in made:
            for fault in instance.store.faults.values():
                fault.release()
        try:
            for instance in made:
                check_all_evictable(instance)
        finally:
            for instance in made:
                instance.close()
