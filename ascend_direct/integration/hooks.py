# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Hooks on SGLang where no contract exists; installed in scheduler processes that use the cache.

Owns the patches and the check that they took. Each is a row of the seam table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ascend_direct.errors import ConfigError

_UPDATER = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager."
WEIGHT_UPDATES = tuple(
    _UPDATER + name
    for name in (
        "begin_weight_update",
        "update_weights_from_disk",
        "update_weights_from_distributed",
        "update_weights_from_ipc",
        "update_weights_from_tensor",
    )
)
BEAM_SEARCH = "sglang.srt.beam_search.coordinator.BeamCoordinator.validate_and_init"
BEAM_REFUSED = "Beam search is not supported with --enable-hierarchical-cache-direct."


def install(detach: Callable[[str], None]) -> None:
    """Patch this process; one scheduler per process.

    Args:
        detach: called before the model's weights change: pages stored until then are of other
            weights, and SGLang's page hashes do not say so.

    Raises:
        ConfigError: SGLang did not apply a hook (it only logs that).
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    def before_update(*args: Any, **kwargs: Any) -> None:
        detach("the model's weights changed at run time")

    def refuse_beams(*args: Any, **kwargs: Any) -> str:
        return BEAM_REFUSED

    for target in WEIGHT_UPDATES:
        HookRegistry.register(target, before_update, HookType.BEFORE)
    HookRegistry.register(BEAM_SEARCH, refuse_beams, HookType.AROUND)
    HookRegistry.apply_hooks()
    missing = [t for t in (*WEIGHT_UPDATES, BEAM_SEARCH) if t not in HookRegistry._patched]
    if missing:
        raise ConfigError([f"SGLang did not apply the hook on {target}." for target in missing])
