# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""SGLang's entry point (group `sglang.srt.plugins`): the flag, and what it switches on.

SGLang imports this file in every process, used or not, so it needs the standard library only and
does nothing until the flag is seen. It also logs and swallows a plugin's exceptions; a server that
was asked for the cache must not run without it, so failures here end the process instead.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from typing import Any

from ascend_direct.names import ACTIVE_ENV, CONFIG_FLAG, FLAG, LINKER_CLASS, LINKER_MODULE


def engine_args(config: Mapping[str, Any] | str | None = None) -> dict[str, Any]:
    """What `sglang.Engine` needs instead of the flag: `Engine(..., **engine_args({...}))`.

    Args:
        config: as for ``--hierarchical-cache-direct-config``: a mapping, JSON text or ``@file``.
    """
    extra = {"source": dict(config) if isinstance(config, Mapping) else config}
    return {
        "enable_unified_cache_external_linker": True,
        "unified_cache_external_linker_backend": "dynamic",
        "unified_cache_external_linker_config": {
            "linker": LINKER_CLASS,
            "linker_module_path": LINKER_MODULE,
            "linker_extra_config": extra,
        },
    }


def register() -> None:
    """Called by SGLang once in each process. Without the flag nothing but the flag is added."""
    try:
        _register()
    except Exception as error:
        # Without the switch a broken plugin is SGLang's to report; with it, it is ours to stop.
        if os.environ.get(ACTIVE_ENV):
            raise SystemExit(f"{FLAG}: the plugin failed in a server process: {error}") from error
        raise


def _register() -> None:
    from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    server_args = "sglang.srt.server_args.ServerArgs."
    HookRegistry.register(server_args + "add_cli_args", _add_flags, HookType.AFTER)
    HookRegistry.register(server_args + "from_cli_args", _from_cli_args, HookType.AROUND)
    register_resolution_hook("handle_hicache")(_resolve)
    if os.environ.get(ACTIVE_ENV):
        from ascend_direct.integration.launch import register_backend

        register_backend()


def _add_flags(_result: Any, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
    """AFTER `ServerArgs.add_cli_args`."""
    group = parser.add_argument_group("ascend_direct: device KV cache linked to a MemCache pool")
    group.add_argument(
        FLAG,
        action="store_true",
        help="Load prefixes straight from a shared pool into device memory and write KV back to "
        "it, without a host tier. Needs the radix cache; excludes HiCache, LMCache and FlexKV.",
    )
    group.add_argument(
        CONFIG_FLAG,
        type=str,
        default=None,
        metavar="JSON|@FILE",
        help='Options of that cache, for example \'{"store": "memcache", "memcache": '
        '{"meta_service_url": "tcp://10.0.0.1:5000"}}\' or @/etc/ascend_direct.json. What differs '
        "by host goes to the environment: ASCEND_DIRECT_MEMCACHE__HCOM_URL sets "
        "memcache.hcom_url. All options: docs/configuration.md.",
    )


def _from_cli_args(
    original: Callable[..., Any], cls: type, args: argparse.Namespace, *rest: Any, **named: Any
) -> Any:
    """AROUND `ServerArgs.from_cli_args`: the flags become the fields SGLang declares."""
    wanted = getattr(args, FLAG[2:].replace("-", "_"), False)
    source = getattr(args, CONFIG_FLAG[2:].replace("-", "_"), None)
    if source is not None and not wanted:
        raise SystemExit(f"{CONFIG_FLAG} is given without {FLAG}; add the flag or drop the option.")
    if wanted:
        if getattr(args, "unified_cache_external_linker_config", None) is not None:
            raise SystemExit(
                f"{FLAG} sets --unified-cache-external-linker-config itself; "
                f"move its content to {CONFIG_FLAG}."
            )
        if getattr(args, "unified_cache_external_linker_backend", "dynamic") == "mori":
            raise SystemExit(
                f"{FLAG} is a linker itself; drop --unified-cache-external-linker-backend."
            )
        for name, value in engine_args(source).items():
            setattr(args, name, value)
        if getattr(args, "disaggregation_mode", None) == "decode":  # else SGLang keeps no tree
            args.disaggregation_decode_enable_radix_cache = True
        os.environ[ACTIVE_ENV] = "cli"
    return original(cls, args, *rest, **named)


def _resolve(server_args: Any, previous: Callable[[Any], None]) -> None:
    """Resolution hook `handle_hicache`: with the flag, validate the mode and select the backend."""
    from sglang.srt.arg_groups.overrides import resolving_view

    view = resolving_view(server_args)
    config = view.unified_cache_external_linker_config
    ours = isinstance(config, dict) and config.get("linker_module_path") == LINKER_MODULE
    if not (ours and view.enable_unified_cache_external_linker):
        previous(server_args)
        return
    from ascend_direct.errors import ConfigError
    from ascend_direct.integration.launch import resolve

    try:
        resolve(server_args, previous)
    except ConfigError as error:
        if os.environ.get(ACTIVE_ENV) == "cli":  # a traceback would only bury the reasons
            raise SystemExit(str(error)) from None
        raise
