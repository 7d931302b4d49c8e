# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""From the command line to what a scheduler process starts with, through SGLang's own functions.

Owns: plugin loading, argument parsing, resolution, the pickle that crosses to the scheduler, and
the switch of the store to the in-process one. Does not build a cache (instance does).
"""

from __future__ import annotations

import functools
import json
import pickle
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ascend_direct import names
from ascend_direct.integration import factory, launch
from ascend_direct.store.base import PageStore
from scripts.sglang_cpu.models import make_model

from ..fakes.memory_store import MemoryStore

# Everything a test may leave to the defaults, short enough that a hang does not stop the suite.
TEST_CONFIG: Mapping[str, Any] = {
    "model_id": "test-model",
    "min_load_tokens": 1,
    "lookup_timeout_ms": 5_000,
    "load_timeout_ms": 5_000,
    "store_timeout_ms": 60_000,
    "lookup_memo_ms": 1,
    "log_interval_s": 0,
}


@functools.cache
def model_path() -> str:
    """A tiny local model: SGLang's arguments want one; no weight is ever loaded."""
    folder = Path(tempfile.gettempdir()) / "ascend_direct_tests" / "gqa"
    return str(make_model(folder, "gqa", layers=1, hidden=64))


@functools.cache
def load_plugin() -> None:
    """As each SGLang process does first."""
    from sglang.srt.plugins import load_plugins

    load_plugins()


@contextmanager
def store_is(store: PageStore) -> Iterator[None]:
    """Whatever store the configuration names, it is this one; the environment is left as it was."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factory, "choose_store", lambda config: store)
        patch.setattr(launch, "choose_store", lambda config: MemoryStore())  # the launcher's own
        patch.setenv(names.ACTIVE_ENV, "")  # the plugin sets it for its children
        yield


def command_line(*more: str, page_size: int = 16) -> list[str]:
    """Arguments of a CPU server without the cache."""
    return [
        *("--model-path", model_path(), "--device", "cpu"),
        *("--attention-backend", "torch_native", "--page-size", str(page_size)),
        *more,
    ]


def with_flag(config: Mapping[str, Any] | None = None) -> list[str]:
    """The two options of the cache."""
    merged = {**TEST_CONFIG, **(config or {})}
    return [names.FLAG, names.CONFIG_FLAG, json.dumps(merged)]


def resolved(arguments: Sequence[str]) -> Any:
    """Server arguments as a scheduler process receives them."""
    load_plugin()
    from sglang.srt.server_args import prepare_server_args

    parsed = prepare_server_args(list(arguments))
    parsed.resolve_once()
    parsed.check_server_args()
    return pickle.loads(pickle.dumps(parsed))


def published(arguments: Sequence[str]) -> Any:
    """`resolved`, and made this process's configuration, as a scheduler does."""
    from sglang.srt.runtime_context import publish

    args = resolved(arguments)
    publish(args, role="scheduler")
    return args
