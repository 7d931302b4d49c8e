# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Hooks on SGLang where no contract exists; installed in scheduler processes that use the cache.

Owns the patches and the check that they took. Each is a row of the seam table.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ascend_direct.errors import ConfigError

if TYPE_CHECKING:
    from ascend_direct.integration.decode_offload import DecodeOffload
    from ascend_direct.integration.lookahead import LookAhead

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
_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler."
ROUND = _SCHEDULER + "_process_hicache_events"
ADMISSION = _SCHEDULER + "_get_new_batch_prefill_raw"
DECODE_ROUND = (
    "sglang.srt.disaggregation.decode.SchedulerDisaggregationDecodeMixin.process_decode_queue"
)
# How long a scheduler that holds requests back and has nothing else to do leaves the interpreter
# to the transfer threads.
IDLE_PAUSE_S = 0.0003
# Of one request, as SGLang's prefill budget clips it (CLIP_MAX_NEW_TOKENS).
MOST_NEW_TOKENS = 4096
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
    _apply(*WEIGHT_UPDATES, BEAM_SEARCH)


def install_look_ahead(cache: Any, look_ahead: LookAhead) -> None:
    """Let the scheduler of this process look ahead, and pass over the requests it holds back.

    Raises:
        ConfigError: SGLang did not apply a hook.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    def before_round(scheduler: Any, *args: Any, **kwargs: Any) -> None:
        promised = promised_tokens(
            scheduler.chunked_req,
            scheduler.running_batch.reqs,
            scheduler.new_token_ratio_tracker.current,
        )
        look_ahead.round(cache, scheduler.waiting_queue, promised)

    def admit(original: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        waiting = scheduler.waiting_queue
        held = [req for req in waiting if look_ahead.holds(req.rid)]
        if not held:
            return original(scheduler, *args, **kwargs)
        scheduler.waiting_queue = [req for req in waiting if not look_ahead.holds(req.rid)]
        try:
            batch, running = original(scheduler, *args, **kwargs)
        finally:
            left = {id(req) for req in (*held, *scheduler.waiting_queue)}
            before = {id(req) for req in waiting}
            scheduler.waiting_queue = [req for req in waiting if id(req) in left] + [
                req for req in scheduler.waiting_queue if id(req) not in before
            ]
        if batch is None and running.is_empty():
            time.sleep(IDLE_PAUSE_S)
        return batch, running

    HookRegistry.register(ROUND, before_round, HookType.BEFORE)
    HookRegistry.register(ADMISSION, admit, HookType.AROUND)
    _apply(ROUND, ADMISSION)


def promised_tokens(chunked: Any, running: Sequence[Any], share: float) -> int:
    """Slots that scheduled requests will need: the rest of a prompt that is computed in chunks, and
    what running requests may generate, of which SGLang reckons with a share.

    Args:
        chunked: SGLang's chunked request, or None.
        running: requests that decode.
        share: SGLang's current new-token ratio.
    """
    tokens = 0
    if chunked is not None:
        tokens += len(chunked.full_untruncated_fill_ids) - chunked.kv.kv_allocated_len
    for req in running:
        left = req.sampling_params.max_new_tokens - len(req.output_ids)
        tokens += int(min(left, MOST_NEW_TOKENS) * share)
    return max(0, tokens)


def install_decode(offload: DecodeOffload) -> None:
    """Give the decode loop of this process the round that SGLang leaves out for linkers.

    Raises:
        ConfigError: SGLang did not apply a hook.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    def before_round(scheduler: Any, *args: Any, **kwargs: Any) -> None:
        offload.round(scheduler)

    HookRegistry.register(DECODE_ROUND, before_round, HookType.BEFORE)
    _apply(DECODE_ROUND)


def _apply(*targets: str) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry

    HookRegistry.apply_hooks()
    missing = [target for target in targets if target not in HookRegistry._patched]
    if missing:
        raise ConfigError([f"SGLang did not apply the hook on {target}." for target in missing])
