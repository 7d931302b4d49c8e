# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""What a run found: one dictionary, written as JSON and as a page to read.

Owns the form only; every number comes from the part that measured it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .events import Event
from .invariants import Stalls
from .traffic import Tally

PERCENTILES = (50, 90, 99, 100)
SHOWN = 20


def percentiles_ms(seconds: Sequence[float]) -> dict[str, float]:
    """p50, p90, p99 and the largest, in milliseconds; empty for nothing."""
    ordered = sorted(seconds)
    places = {p: min(len(ordered) - 1, int(len(ordered) * p / 100)) for p in PERCENTILES}
    return {f"p{p}": round(ordered[i] * 1e3, 1) for p, i in places.items()} if ordered else {}


def events_by_kind(events: Iterable[Event]) -> dict[str, int]:
    """How many of each; faults of the store by operation."""
    kinds = (
        f"store {e.target} {e.mode.split()[0]}" if e.track == "store" else e.kind for e in events
    )
    return dict(sorted(Counter(kinds).items()))


def requests(tally: Tally) -> dict[str, Any]:
    """Answers, and how long they took where they were streamed."""
    return {
        **dict(sorted(tally.counts.items())),
        "wrong": len(tally.wrong),
        "failed_or_aborted_by_the_server": len(tally.failed),
        "ttft_ms": percentiles_ms(tally.ttft_s),
        "gap_between_tokens_ms": percentiles_ms(tally.gaps_s),
    }


def stalls(found: Stalls) -> dict[str, Any]:
    """Time of the scheduler in the plugin, calls of 20 ms and more."""
    return {
        call: {"calls": len(times), **percentiles_ms(times)}
        for call, times in sorted(found.seconds.items())
    }


def schedule(events: Sequence[Event]) -> list[dict[str, Any]]:
    """The events as they were planned; the same for the same seed."""
    return [asdict(event) for event in events]


def write(folder: Path, result: dict[str, Any]) -> None:
    """`report.json` and `report.md` in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / "report.md").write_text(markdown(result))


def markdown(result: dict[str, Any]) -> str:
    """The report without its list of events."""
    verdict = "nothing found" if not result["problems"] else f"{len(result['problems'])} PROBLEMS"
    lines = [f"# Chaos run: {verdict}", "", f"`{result['command']}`", ""]
    lines += [f"* {problem}" for problem in result["problems"][:SHOWN]]
    for title, part in result.items():
        if isinstance(part, dict):
            lines += ["", f"## {title.replace('_', ' ')}", "", "| | |", "|---|---|"]
            lines += [f"| {name} | {_cell(value)} |" for name, value in part.items()]
        elif title not in ("problems", "command", "schedule"):
            lines += ["", f"{title.replace('_', ' ')}: {part}"]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {inner}" for name, inner in value.items())
    if isinstance(value, list):
        return "<br>".join(map(str, value))
    return str(value)
