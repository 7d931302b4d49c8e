# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""`ascend-direct pool stats` and `pool ls`: what is in a pool, without joining it.

Owns what is shown. Asking MetaService is store/meta_service_stats'; servers are asked for the two
counters that SGLang has of hits, because MemCache counts calls, not tokens, and no namespaces.
"""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ascend_direct.cli.conventions import Config, complain, option
from ascend_direct.config import MIB, DirectConfig
from ascend_direct.errors import ConfigError, StoreUnavailable
from ascend_direct.store.meta_service import MetaServiceHttp
from ascend_direct.store.meta_service_stats import counters, namespaces, segments

SERVER_TIMEOUT_S = 10.0
_MAX_METRICS_BYTES = 32 << 20
_PROMPT = re.compile(r"^sglang:prompt_tokens_total\{[^}]*\} (\S+)$", re.MULTILINE)
_STORED = re.compile(
    r'^sglang:cached_tokens_total\{[^}]*cache_source="storage[^}]*\} (\S+)$', re.MULTILINE
)

Servers = Annotated[
    list[str] | None,
    option("--server", "An SGLang server with --enable-metrics: its hits; may be repeated."),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object.")]


def stats(config: Config = None, server: Servers = None, as_json: AsJson = False) -> None:
    """Members, memory, keys and evictions of the pool, and hits of servers on it.

    Asks MetaService at memcache.metrics_url; joins nothing. MemCache does not count hits by
    namespace: give --server for prompt tokens and those that came from the pool, by server.

    Exit codes: 0 shown; 2 bad configuration; 3 the pool, or a server, does not answer.
    """
    _run(config, as_json, lambda http: _stats(http, server or []), _print_stats)


def ls(config: Config = None, as_json: AsJson = False) -> None:
    """Namespaces in the pool, with their objects; `""` is what other programs stored.

    The 16 digits are in each server's start line, and are what `pool clear --namespace` takes.

    Exit codes: 0 shown; 2 bad configuration; 3 the pool does not answer.
    """
    _run(config, as_json, _list, _print_list)


def _run(
    source: str | None,
    as_json: bool,
    ask: Callable[[MetaServiceHttp], dict[str, Any]],
    show: Callable[[dict[str, Any], Console], None],
) -> None:
    try:
        url = DirectConfig.load(source).memcache.metrics_url
        if not url:
            raise ConfigError(["MetaService is asked over HTTP: set memcache.metrics_url."])
        http = MetaServiceHttp(url)
        try:
            found = {"pool": url, **ask(http)}
        finally:
            http.close()
    except (ConfigError, StoreUnavailable) as error:
        raise typer.Exit(complain(error)) from None
    if as_json:
        typer.echo(json.dumps(found))
    else:
        show(found, Console(highlight=False))


def _stats(http: MetaServiceHttp, servers: list[str]) -> dict[str, Any]:
    counts, memory, links = counters(http), segments(http), http.links()
    return {
        "keys": counts["keys"],
        "evicted": counts.get("evict", 0),
        "members": None if links is None else links.members,
        "links_complete": None if links is None else links.complete,
        "total_bytes": sum(segment.total_bytes for segment in memory),
        "used_bytes": sum(segment.used_bytes for segment in memory),
        "segments": [asdict(segment) for segment in memory],
        "servers": [_hits(url) for url in servers],
        "counters": counts,
    }


def _hits(url: str) -> dict[str, Any]:
    try:
        text = _metrics(f"{url.rstrip('/')}/metrics")
        prompt, stored = (sum(map(float, family.findall(text))) for family in (_PROMPT, _STORED))
    except (OSError, ValueError) as error:
        raise StoreUnavailable("stats", f"{url} does not tell its metrics ({error})") from error
    share = round(stored / prompt, 4) if prompt else None
    return {"server": url, "prompt_tokens": int(prompt), "pool_tokens": int(stored), "share": share}


def _metrics(url: str) -> str:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(url, timeout=SERVER_TIMEOUT_S) as answer:
            text: str = answer.read(_MAX_METRICS_BYTES).decode("utf-8", "replace")
    except urllib.error.HTTPError as error:
        error.close()
        raise
    return text


def _print_stats(found: dict[str, Any], console: Console) -> None:
    linked = {True: "all linked", False: "not all linked", None: "links unknown"}
    console.print(
        f"{found['pool']}: {found['keys']} keys, {found['evicted']} evicted since it was started, "
        f"{found['members']} members, {linked[found['links_complete']]}"
    )
    table = Table("memory of", "medium", "used MiB", "of MiB", "full")
    whole = {"name": "all", "medium": "", **{n: found[n] for n in ("total_bytes", "used_bytes")}}
    for row in [*found["segments"], whole]:
        used, total = row["used_bytes"], row["total_bytes"]
        full = f"{used / total:.0%}" if total else "-"
        table.add_row(row["name"], row["medium"], str(used // MIB), str(total // MIB), full)
    console.print(table)
    for row in found["servers"]:
        share = "-" if row["share"] is None else f"{row['share']:.1%}"
        console.print(
            f"{row['server']}: {row['pool_tokens']} of {row['prompt_tokens']} prompt tokens came "
            f"from the pool ({share})"
        )


def _list(http: MetaServiceHttp) -> dict[str, Any]:
    found = namespaces(http.keys(""))
    return {
        "namespaces": [
            {"namespace": name, "objects": one.objects, "parts": dict(sorted(one.parts.items()))}
            for name, one in sorted(found.items(), key=lambda item: -item[1].objects)
        ]
    }


def _print_list(found: dict[str, Any], console: Console) -> None:
    if not found["namespaces"]:
        console.print(f"{found['pool']}: no keys")
        return
    table = Table("namespace", "objects", "by rank part")
    for row in found["namespaces"]:
        parts = ", ".join(f"{part or 'other'} {count}" for part, count in row["parts"].items())
        table.add_row(row["namespace"] or '""', str(row["objects"]), parts)
    console.print(table)
