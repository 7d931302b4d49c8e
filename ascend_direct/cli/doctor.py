# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""`ascend-direct doctor`: will a server with the plugin run here, and if not, why.

Owns the order of the checks, their looks and the exit codes. What is looked at is checks' (this
machine) and pool_checks' (the pool).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console

from ascend_direct.cli import checks, pool_checks
from ascend_direct.cli.checks import Check
from ascend_direct.cli.conventions import EXIT_CONFIG, EXIT_UNAVAILABLE, Config
from ascend_direct.config import DirectConfig
from ascend_direct.store.base import PageStore

LOOKS = {
    "ok": "[green]ok     [/]",
    "warning": "[yellow]warning[/]",
    "failure": "[red]FAILURE[/]",
    "not checked": "[dim]-      [/]",
}
NAME_WIDTH = 18

Quick = Annotated[
    bool, typer.Option("--quick", help="Neither import SGLang nor join the pool: a second.")
]
Timeout = Annotated[
    float, typer.Option("--timeout-s", min=1.0, help="Bound on the round trip through the pool.")
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object.")]


def doctor(
    config: Config = None,
    quick: Quick = False,
    timeout_s: Timeout = 90.0,
    as_json: AsJson = False,
) -> None:
    """Look at everything a server with the plugin needs, and say what to do where it is not so.

    Versions, plugin, every seam to SGLang, configuration, Ascend software and hardware, limits,
    MetaService and members, and one page of random bytes to the pool and back (removed afterwards).

    Exit codes: 0 nothing fails; 2 this machine or its configuration does; 3 only the pool does.
    """
    console = Console(highlight=False)
    found: list[Check] = []
    for check in examine(config, quick, timeout_s):
        found.append(check)
        if not as_json:
            console.print(f"{LOOKS[check.status]} {check.name:<{NAME_WIDTH}}", end=" ")
            console.print(check.found, markup=False, soft_wrap=True)
    failures = [check for check in found if check.status == "failure"]
    if as_json:
        typer.echo(json.dumps({"ok": not failures, "checks": [asdict(check) for check in found]}))
    else:
        warnings = sum(check.status == "warning" for check in found)
        console.print(f"{len(found)} checks, {len(failures)} failed, {warnings} warnings")
    if failures:
        only_pool = all(check.of_pool for check in failures)
        raise typer.Exit(EXIT_UNAVAILABLE if only_pool else EXIT_CONFIG)


def examine(source: str | None, quick: bool, timeout_s: float) -> Iterator[Check]:
    """Every check, each as soon as it is done. A pool is joined only where nothing has failed."""
    config, read = checks.configuration(source)
    chosen, usable = (None, []) if config is None else checks.store(config)
    failed = False
    for check in _before_joining(config, chosen, [read, *usable], quick):
        failed = failed or check.status == "failure"
        yield check
    if quick or failed or config is None or chosen is None:
        why = "--quick" if quick else "mend what fails above first"
        yield Check("round trip", "not checked", why)
        return
    chip, tried = pool_checks.round_trip(source, timeout_s)
    if chosen.name == "memcache":
        yield pool_checks.protocol(config.memcache, chip)
    yield tried


def _before_joining(
    config: DirectConfig | None, chosen: PageStore | None, known: list[Check], quick: bool
) -> Iterator[Check]:
    yield from checks.software()
    if not quick:
        yield checks.sglang()
    yield from known
    if config is None or chosen is None:
        return
    if chosen.name == "memcache":
        yield from checks.machine(config.memcache)
    yield from pool_checks.pool(config, chosen)
