# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Prompts and small actions that several integration tests share."""

from __future__ import annotations

from sglang.srt.mem_cache.base_prefix_cache import EvictParams

from .audit import audit, drain
from .instance import Instance
from .served import Served


def prompt(length: int, seed: int = 0) -> list[int]:
    """Tokens that share no page with another seed's."""
    return [(seed * 7919 + i * i * 31 + i) % 997 for i in range(length)]


def serve_and_store(instance: Instance, tokens: list[int], **more: object) -> Served:
    """Serve a prompt; when this returns its pages are in the pool."""
    served = instance.serve(tokens, **more)
    drain(instance)
    audit(instance)
    return served


def evict_all(instance: Instance) -> None:
    """Empty the device cache; the pool keeps its pages."""
    drain(instance)
    instance.tree.evict(EvictParams(num_tokens=instance.allocator.size))
    assert instance.tree.evictable_size() == 0


def counts(instance: Instance) -> dict[str, int]:
    """The instance's counters."""
    return instance.controller.metrics.snapshot()
