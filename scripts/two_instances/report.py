# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""What a run looks like: a table in the terminal, a JSON file, a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.table import Table

from two_instances.run import Result


class Proved(Protocol):
    """What a demonstration has found, whichever it was."""

    facts: dict[str, Any]
    problems: list[str]

    def as_dict(self) -> dict[str, Any]:
        """All of it, for a file."""


COLOURS = {"computed": "#c8c8c8", "device": "#4c78a8", "storage": "#54a24b"}


def print_table(result: Result, console: Console) -> None:
    """Per phase: median TTFT, against the first, and prompt tokens by tier."""
    table = Table(title="Time to first token and where the prompt's KV came from (medians)")
    for name in ("request", "TTFT", "vs. no cache", "computed", "device", "pool (storage)"):
        table.add_column(name, justify="left" if name == "request" else "right")
    base_s = result.median_ttft_s(result.phases()[0])
    for phase in result.phases():
        answers = result.phase(phase)
        ttft_s = result.median_ttft_s(phase)
        tiers = [
            sum(getattr(answer, f"{tier}_tokens") for answer in answers) // len(answers)
            for tier in ("computed", "device", "storage")
        ]
        ratio = f"{ttft_s / base_s:.2f} ×"
        table.add_row(phase, f"{ttft_s * 1e3:.0f} ms", ratio, *map(str, tiers))
    console.print(table)


def print_verdict(result: Proved, answers: int, console: Console) -> None:
    """The last lines: the facts, and whether all was proved or what was not."""
    for name, value in result.facts.items():
        console.print(f"  {name}: {value}")
    if result.problems:
        console.print(f"[bold red]FAILED[/]: {len(result.problems)} problem(s)")
        for problem in result.problems[:20]:
            console.print(f"  [red]*[/] {problem}")
        return
    console.print(f"[bold green]PASSED[/]: all {answers} answers equal those without any cache.")


def write_json(result: Proved, path: Path) -> None:
    """All of it."""
    path.write_text(json.dumps(result.as_dict(), indent=1) + "\n", encoding="utf-8")


def write_picture(result: Result, path: Path, title: str) -> None:
    """TTFT per phase beside prompt tokens by tier, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    phases = result.phases()[::-1]
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(11, 0.7 * len(phases) + 1.6), sharey=True
    )
    left.barh(phases, [result.median_ttft_s(phase) * 1e3 for phase in phases], color="#f58518")
    for place, phase in enumerate(phases):
        points = [answer.ttft_s * 1e3 for answer in result.phase(phase)]
        left.plot(points, [place] * len(points), "k.", markersize=4, alpha=0.6)
    left.set_xlabel("time to first token, ms (bar: median, dots: requests)")
    start = [0.0] * len(phases)
    for tier, colour in COLOURS.items():
        width = [
            sum(getattr(a, f"{tier}_tokens") for a in result.phase(phase))
            / len(result.phase(phase))
            for phase in phases
        ]
        label = "pool (storage)" if tier == "storage" else tier
        right.barh(phases, width, left=start, color=colour, label=label)
        start = [a + b for a, b in zip(start, width, strict=True)]
    right.set_xlabel("prompt tokens by origin (mean)")
    right.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=3, frameon=False)
    figure.suptitle(title, y=1.04, fontsize=11)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)
