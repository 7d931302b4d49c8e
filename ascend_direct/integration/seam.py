# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Does the installed SGLang have what this package leans on? Asked before a server starts.

Owns the probe; what is leaned on is in seam_table.
"""

from __future__ import annotations

import inspect
import logging
import pkgutil
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ascend_direct.integration.seam_table import LINKER, SEAMS, Seam

logger = logging.getLogger(__name__)

TESTED_SGLANG = "0.5.23"


LINKER_METHODS = frozenset(
    {
        "cancel_queued_load",
        "close",
        "finish_layer_wise_loading",
        "load",
        "lookup",
        "num_completed_offloads",
        "offload",
        "pop_completed_offload",
        "reset",
        "start_layer_wise_loading",
    }
)


def problems(seams: tuple[Seam, ...] = SEAMS) -> list[str]:
    """How the installed SGLang differs from the table; [] when every seam fits."""
    try:
        installed = version("sglang")
    except PackageNotFoundError:
        return ["SGLang is not installed in this environment."]
    found = [problem for seam in seams if (problem := _mismatch(seam))]
    if found:
        found.append(f"SGLang {installed} is installed; {TESTED_SGLANG} is what was tested.")
    elif installed != TESTED_SGLANG:
        logger.warning(
            "ascend_direct was tested with SGLang %s; %s fits the seam table, so starting anyway",
            TESTED_SGLANG,
            installed,
        )
    return found


def _mismatch(seam: Seam) -> str | None:
    try:
        symbol = pkgutil.resolve_name(seam.path)
    except (ImportError, AttributeError) as error:
        return f"{seam.path} is gone ({error}); it is needed for: {seam.why}."
    if seam.path.endswith("UnifiedCacheLinker.load"):
        extra = _linker_methods(symbol) ^ LINKER_METHODS
        if extra:
            return f"UnifiedCacheLinker's abstract methods changed: {sorted(extra)}."
    if not seam.parameters:
        return None
    names = [name for name in inspect.signature(symbol).parameters if name not in ("self", "cls")]
    missing = [name for name in seam.parameters if name not in names]
    return f"{seam.path} has no parameter {missing} any more ({names})." if missing else None


def _linker_methods(method: Any) -> frozenset[str]:
    owner = pkgutil.resolve_name(f"{LINKER}.UnifiedCacheLinker")
    assert getattr(owner, "load", None) is method
    methods: frozenset[str] = owner.__abstractmethods__
    return methods
