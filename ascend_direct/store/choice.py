# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Which store a configuration means; shared by servers and commands. Opens nothing."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from ascend_direct.config import DirectConfig
from ascend_direct.store.base import PageStore, provider


def choose_store(config: DirectConfig) -> PageStore:
    """The store the configuration names, not opened.

    Raises:
        ConfigError: it is not installed, or its section is wrong.
    """
    name = config.store
    if name == "auto":
        name = "memcache" if importlib.util.find_spec("memcache_hybrid") else "local"
    sections: dict[str, Mapping[str, Any]] = {
        "memcache": config.memcache.model_dump(),
        "local": config.local.model_dump(),
    }
    return provider(name)(dict(sections.get(name, config.provider)))
