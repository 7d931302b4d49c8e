# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Measured against predicted: the table, the verdict, and the record that `plan` shows.

Owns which figures are compared and how. A figure's deviation is predicted ÷ measured − 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.table import Table

from ascend_direct.cli.planning.simulation import Outcome
from ascend_direct.cli.planning.traces import Trace
from measured_plan.replay import Answered


@dataclass(frozen=True)
class Figure:
    """One quantity, both ways."""

    name: str
    unit: str
    measured: float
    predicted: float

    @property
    def percent(self) -> float:
        """Deviation of the prediction; 0 where both are 0."""
        if self.measured == self.predicted:
            return 0.0
        return 100 * (self.predicted / self.measured - 1) if self.measured else float("inf")


def figures(trace: Trace, answers: Sequence[Answered], outcome: Outcome) -> list[Figure]:
    """Everything that is compared."""
    prompts = trace.prompt_tokens
    device = sum(answer.device_tokens for answer in answers)
    loaded = sum(answer.loaded_tokens for answer in answers)
    own_device, own_loaded = sum(outcome.device_tokens), sum(outcome.loaded_tokens)
    found = [
        Figure(
            "hit rate",
            " %",
            100 * (device + loaded) / prompts,
            100 * (own_device + own_loaded) / prompts,
        ),
        Figure("device hit tokens", "", device, own_device),
        Figure("pool hit tokens", "", loaded, own_loaded),
    ]
    measured_ms = 1e3 * np.array([answer.ttft_s for answer in answers])
    predicted_ms = 1e3 * np.frombuffer(outcome.ttft_s)
    found.append(Figure("mean TTFT", " ms", measured_ms.mean(), predicted_ms.mean()))
    for percent in (50, 90):
        pair = (np.percentile(times, percent) for times in (measured_ms, predicted_ms))
        found.append(Figure(f"p{percent} TTFT", " ms", *map(float, pair)))
    return found


def rounded(found: Sequence[Figure]) -> list[dict[str, Any]]:
    """For JSON and for the record: figures as they are shown everywhere."""
    return [
        {
            **asdict(figure),
            "measured": _short(figure.measured),
            "predicted": _short(figure.predicted),
            "percent": round(figure.percent, 1),
        }
        for figure in found
    ]


def _short(value: float) -> float:
    return round(value, 1) if value < 1000 else round(value)


def table(found: Sequence[dict[str, Any]], limit_percent: float) -> Table:
    """For people."""
    made = Table("", "measured", "predicted", "deviation", "")
    for figure in found:
        made.add_row(
            figure["name"],
            f"{figure['measured']:,}{figure['unit']}",
            f"{figure['predicted']:,}{figure['unit']}",
            f"{figure['percent']:+.1f} %",
            "" if abs(figure["percent"]) <= limit_percent else "OUTSIDE",
        )
    return made


def markdown(found: Sequence[dict[str, Any]]) -> str:
    """The table of docs/benchmarks.md."""
    lines = ["| | measured | predicted | deviation |", "|---|---|---|---|"]
    lines += [
        f"| {f['name']} | {f['measured']:,}{f['unit']} | {f['predicted']:,}{f['unit']} | "
        f"{f['percent']:+.1f} % |"
        for f in found
    ]
    return "\n".join(lines)
