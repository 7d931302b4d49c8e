# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""`ascend-direct pool clear`: remove pages from a pool, after asking.

Owns the question and the answer. Removing is each store's `clear`; servers that are up lose nothing
but hits: what they believe stored is refused when they load it, and recomputed.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Annotated

import typer

from ascend_direct.cli.conventions import EXIT_OK, Config, complain, end, option, take_stdout
from ascend_direct.config import DirectConfig
from ascend_direct.errors import ConfigError, StoreUnavailable
from ascend_direct.page_key import KEY_VERSION
from ascend_direct.store.base import PageStore, StoreContext
from ascend_direct.store.choice import choose_store

EXIT_REFUSED = 1

Namespace = Annotated[
    str | None,
    option("--namespace", "One namespace: the 16 digits in a server's start line."),
]
Everything = Annotated[
    bool, typer.Option("--everything", help="Objects of other programs too, without listing keys.")
]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object.")]


def clear(
    config: Config = None,
    namespace: Namespace = None,
    everything: Everything = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Remove pages from the pool: all of this plugin's, or those of one namespace.

    Servers may be up: they recompute what is gone. Asks first, naming the pool; `--yes` does not.

    Exit codes: 0 removed; 1 the answer was no; 2 bad configuration, or this machine cannot; 3 the
    pool is not available, or pages are left.
    """
    joined = False
    try:
        store, name = client_store(config)
        prefix = _prefix(namespace, everything)
        if not yes:
            _ask(name, namespace, everything)
        joined = store.name == "memcache"
        out = take_stdout() if joined else sys.stdout
        removed = _removed(store, prefix)
        event = {"event": "cleared", "pool": name, "prefix": prefix, "removed": removed}
        count = "all" if removed is None else removed
        line = json.dumps(event) if as_json else f"removed {count} objects from {name}"
        print(line, file=out, flush=True)
        code = EXIT_OK
    except (ConfigError, StoreUnavailable) as error:
        code = complain(error)
    if joined:
        end(code)
    raise typer.Exit(code)


def client_store(source: str | None) -> tuple[PageStore, str]:
    """The store, as a client that gives no memory, and what to call its pool."""
    config = DirectConfig.load(source)
    taking = config.memcache.model_copy(update={"dram_size": "0", "hbm_size": "0"})
    store = choose_store(config.model_copy(update={"memcache": taking}))
    names = {"memcache": taking.meta_service_url, "local": config.local.path}
    return store, names.get(store.name, store.name)


def _prefix(namespace: str | None, everything: bool) -> str:
    """What the keys of the pages begin with."""
    if namespace is None:
        return "" if everything else f"{KEY_VERSION}:"
    if everything:
        raise ConfigError(["--namespace and --everything: give one of them."])
    if not re.fullmatch(r"[0-9a-f]{16}", namespace):
        raise ConfigError([f"--namespace {namespace!r}: give 16 hexadecimal digits."])
    return f"{KEY_VERSION}:{namespace}:"


def _ask(name: str, namespace: str | None, everything: bool) -> None:
    what = f"all pages of namespace {namespace}" if namespace else "all pages of ascend_direct"
    if everything:
        what = "all objects, those of other programs too,"
    if not typer.confirm(f"Remove {what} from the pool {name}?", err=True):
        raise typer.Exit(EXIT_REFUSED)


def _removed(store: PageStore, prefix: str) -> int | None:
    store.open(StoreContext())
    try:
        return store.clear(prefix)
    finally:
        store.close()
