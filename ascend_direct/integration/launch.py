# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""In the launcher: configuration and mode are checked, the backend is selected and handed down.

Runs before any process that holds memory is started. Owns what crosses to those processes: the
validated configuration and the model's identity, inside SGLang's own linker configuration field.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

from ascend_direct.config import DirectConfig
from ascend_direct.errors import ConfigError
from ascend_direct.integration import seam
from ascend_direct.integration.mode import conflicts
from ascend_direct.model_identity import MODEL_FIELDS, model_fields
from ascend_direct.names import ACTIVE_ENV, BACKEND, FLAG
from ascend_direct.store.choice import choose_store

logger = logging.getLogger(__name__)


def resolve(server_args: Any, previous: Callable[[Any], None]) -> None:
    """The body of the resolution hook `handle_hicache`.

    Raises:
        ConfigError: with every reason at once.
    """
    from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view

    view = resolving_view(server_args)
    linker = view.unified_cache_external_linker_config
    extra = linker.get("linker_extra_config") or {}
    if "config" in extra:  # this step has run before
        return
    config, reasons = _read(extra)
    reasons += _seam_problems() + conflicts(view)
    if config is not None:
        reasons += _store_problems(config, view.device)
    if reasons:
        raise ConfigError(reasons)
    assert config is not None
    fields = model_fields(
        {name: getattr(view, name, None) for name in MODEL_FIELDS},
        model_id=config.model_id,
        weights_fingerprint=config.weights_fingerprint,
    )
    previous(server_args)
    handed = {"config": config.public_dict(), "model": fields}
    # SGLang logs its arguments; where keys lie is not for logs, so that goes by the environment.
    os.environ.update(config.secret_environment())
    declare_resolution(
        server_args,
        BACKEND,
        radix_cache_backend=BACKEND,
        unified_cache_external_linker_config={**linker, "linker_extra_config": handed},
    )
    os.environ.setdefault(ACTIVE_ENV, "engine")
    register_backend()


def _read(extra: Mapping[str, Any]) -> tuple[DirectConfig | None, list[str]]:
    unknown = sorted(set(extra) - {"source"})
    reasons = [
        f"linker_extra_config: unknown field {name!r}; use engine_args()." for name in unknown
    ]
    source = extra.get("source")
    if _holds_tls(source):
        reasons.append(
            "memcache.tls stands in SGLang's arguments, which are logged and served: move it to a "
            "file (@/path/to/file.json) or set ASCEND_DIRECT_MEMCACHE__TLS__*."
        )
    try:
        return DirectConfig.load(source), reasons
    except ConfigError as error:
        return None, reasons + list(error.reasons)


def _holds_tls(source: Any) -> bool:
    try:
        options = json.loads(source) if isinstance(source, str) else source
        return bool(options["memcache"]["tls"])
    except (ValueError, LookupError, TypeError, RecursionError):
        return False  # what is wrong with it is told by whoever reads it


def _seam_problems() -> list[str]:
    found = seam.problems()
    advice = f"Install SGLang {seam.TESTED_SGLANG}, or drop {FLAG}."
    return [" ".join([*found, advice])] if found else []


def _store_problems(config: DirectConfig, device: str | None) -> list[str]:
    try:
        store = choose_store(config)
        reasons = list(store.problems())
        away = store.unreachable()
        store.close()
    except ConfigError as error:
        return list(error.reasons)
    except Exception as error:  # noqa: BLE001 (a store may be anybody's code)
        what = f"{type(error).__name__}: {error}"
        return [f"store {config.store!r} fails ({what}): install what it needs or use another."]
    if away and config.on_pool_unavailable == "fail":
        reasons.append(away)
    if store.name == "local" and str(device).split(":")[0] != "cpu":
        reasons.append(f"store 'local' cannot reach the memory of {device}: use memcache.")
    return reasons


def register_backend() -> None:
    """Make `--radix-cache-backend ascend_direct` known to this process; again is fine."""
    from sglang.srt.mem_cache.registry import get_radix_cache_factory, register_radix_cache_backend

    if get_radix_cache_factory(BACKEND) is None:
        register_radix_cache_backend(BACKEND, _create_cache)


def _create_cache(context: Any) -> Any:
    from sglang.srt.mem_cache.registry import create_unified_radix_cache

    from ascend_direct.integration.radix_cache import HiRadixCacheDirect

    return create_unified_radix_cache(context, cache_class=HiRadixCacheDirect)
