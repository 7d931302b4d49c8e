# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Every SGLang symbol this package leans on, as data: where, what shape, why, until when.

Owns the table and the probe that compares it with the installed SGLang before a server starts.
docs/design.md prints the table; tests/contract holds the two equal.
"""

from __future__ import annotations

import inspect
import logging
import pkgutil
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

from ascend_direct.integration.hooks import BEAM_SEARCH, WEIGHT_UPDATES

logger = logging.getLogger(__name__)

TESTED_SGLANG = "0.5.23"


class Seam(NamedTuple):
    """One symbol of SGLang.

    Attributes:
        path: dotted path.
        parameters: names its signature must have, in this order; empty for classes and data.
        kind: ``contract`` (public registry or ABC), ``subclass`` (a method we extend), ``hook``
            (patched through SGLang's HookRegistry) or ``read`` (an attribute we rely on).
        why: what it is needed for.
        remove_when: the upstream change that makes it unnecessary.
    """

    path: str
    parameters: tuple[str, ...]
    kind: str
    why: str
    remove_when: str


_LINKER = "sglang.srt.mem_cache.unified_cache.unified_cache_linker"
_CACHE = "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache"
_ARGS = "sglang.srt.server_args.ServerArgs"
_POOLS = "sglang.srt.mem_cache.device_pool_info"
_STAYS = "stays: public contract"
_WEIGHTS = "page hashes carry the weight version"
_POLICY = "the linker wrapper offers policy callbacks"

SEAMS = (
    Seam(
        "sglang.srt.plugins.hook_registry.HookRegistry.register",
        ("target", "hook", "hook_type"),
        "contract",
        "adds the flag to the argument parser",
        _STAYS,
    ),
    Seam(
        f"{_ARGS}.add_cli_args",
        ("parser",),
        "hook",
        "AFTER: the two options",
        "SGLang lets plugins declare arguments",
    ),
    Seam(
        f"{_ARGS}.from_cli_args",
        ("args",),
        "hook",
        "AROUND: the options become declared linker fields",
        "SGLang lets plugins declare arguments",
    ),
    Seam(
        "sglang.srt.arg_groups.resolution_hooks.register_resolution_hook",
        ("name",),
        "contract",
        "handle_hicache: validate the mode, select the backend",
        _STAYS,
    ),
    Seam(
        "sglang.srt.arg_groups.overrides.declare_resolution",
        ("server_args", "source"),
        "contract",
        "sets radix_cache_backend on sealed arguments",
        _STAYS,
    ),
    Seam(
        "sglang.srt.mem_cache.registry.register_radix_cache_backend",
        ("name", "factory"),
        "contract",
        "makes the cache class selectable",
        _STAYS,
    ),
    Seam(
        "sglang.srt.mem_cache.registry.create_unified_radix_cache",
        ("ctx", "cache_class"),
        "contract",
        "builds our subclass with SGLang's components and linker",
        _STAYS,
    ),
    Seam(f"{_LINKER}.UnifiedCacheLinker.lookup", ("rid", "transfers"), "contract", "match", _STAYS),
    Seam(f"{_LINKER}.UnifiedCacheLinker.load", ("rid", "transfers"), "contract", "load", _STAYS),
    Seam(
        f"{_LINKER}.UnifiedCacheLinker.offload",
        ("transfers", "session_id"),
        "contract",
        "write-back",
        _STAYS,
    ),
    Seam(
        f"{_LINKER}.UnifiedCacheLinkerWrapper._update_load",
        ("phase", "req", "component_transfers", "prefix_len"),
        "read",
        "a refused load frees what its transfer names; slots a late call may write are withheld "
        "by naming none",
        "the contract lets a linker keep slots of an abandoned load",
    ),
    Seam(
        f"{_LINKER}.UnifiedCacheLinkerWrapper.has_hit",
        ("rid",),
        "read",
        "attributes pool hits to storage",
        "linker hits count as storage upstream",
    ),
    Seam(f"{_CACHE}.init_cache_linker", ("cache_linker",), "subclass", "write policy", _POLICY),
    Seam(
        f"{_CACHE}.init_load_back",
        ("params",),
        "subclass",
        "cached_tokens_details shows pool hits as storage",
        "linker hits count as storage upstream",
    ),
    Seam(
        f"{_CACHE}.check_hicache_events",
        (),
        "subclass",
        "frees withheld slots, unpins late stores, once per round on all ranks",
        _POLICY,
    ),
    Seam(
        f"{_CACHE}.protected_size",
        (),
        "subclass",
        "withheld slots in SGLang's memory check",
        "the contract lets a linker keep slots of an abandoned load",
    ),
    Seam(
        f"{_CACHE}.finish",
        ("handle", "outcome"),
        "subclass",
        "hit markers of requests that never loaded are dropped",
        "SGLang clears hit markers on success",
    ),
    Seam(
        f"{_CACHE}.on_release",
        ("req", "checkpointed"),
        "subclass",
        "as finish, for requests that held slots: SGLang does not finish those",
        "SGLang clears hit markers on success",
    ),
    Seam(f"{_CACHE}.reset", (), "subclass", "late stores end with the tree", _POLICY),
    Seam(f"{_CACHE}.inc_lock_ref", ("node_id",), "read", "pins nodes of late stores", _POLICY),
    Seam(f"{_CACHE}.dec_lock_ref", ("node_id", "params"), "read", "unpins them", _POLICY),
    *(
        Seam(path, (), "hook", "BEFORE: pages of the old weights must not be used", _WEIGHTS)
        for path in WEIGHT_UPDATES
    ),
    Seam(
        BEAM_SEARCH,
        ("req",),
        "hook",
        "AROUND: beam search is refused, as it is for HiCache",
        "SGLang refuses it for linkers too",
    ),
    Seam(
        "sglang.srt.mem_cache.utils.get_storage_hash_str",
        ("page_size",),
        "read",
        "warmed up at start: its first call compiles",
        "SGLang warms it up",
    ),
    Seam(f"{_POOLS}.MHABufferInfo", (), "read", "page layout of GQA pools", _STAYS),
    Seam(f"{_POOLS}.MLABufferInfo", (), "read", "page layout of MLA pools", _STAYS),
)

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
    owner = pkgutil.resolve_name(f"{_LINKER}.UnifiedCacheLinker")
    assert getattr(owner, "load", None) is method
    methods: frozenset[str] = owner.__abstractmethods__
    return methods
