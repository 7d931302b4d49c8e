# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""The command `ascend-direct`: joins the groups of subcommands, and answers `version`.

Owns what all subcommands share in their help. Imports neither SGLang nor memcache_hybrid.
"""

from __future__ import annotations

import json
import platform
from typing import Annotated

import typer
from rich.console import Console

from ascend_direct import __version__
from ascend_direct.cli import doctor, meta, plan, pool, pool_bench, pool_clear, pool_stats
from ascend_direct.cli.checks import installed

app = typer.Typer(
    name="ascend-direct",
    help="Tools around SGLang servers that share their KV cache through a MemCache pool.\n\n"
    "The servers themselves are started with SGLang's own launcher and the flag "
    "--enable-hierarchical-cache-direct.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
)
for command in (pool_clear.clear, pool_stats.stats, pool_stats.ls, pool_bench.bench):
    pool.app.command()(command)
app.add_typer(pool.app, name="pool")
app.command()(doctor.doctor)
app.command()(meta.meta)
app.command()(plan.plan)

COMPANIONS = ("sglang", "memcache-hybrid", "torch", "torch-npu")


@app.command()
def version(
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON.")] = False,
) -> None:
    """Print this package's version and those it works with; nothing is imported for it."""
    versions = {"ascend-direct": __version__, "python": platform.python_version()}
    found = {name: installed(name) for name in COMPANIONS}
    if as_json:
        typer.echo(json.dumps({**versions, **found}))
        return
    console = Console(highlight=False)
    for name, number in {**versions, **found}.items():
        console.print(f"{name:<16} {number or '[dim]not installed[/dim]'}")


if __name__ == "__main__":
    app()
