# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Measured against predicted: the table, the verdict, and the record that `plan` shows.

Owns which figures are compared and how. A figure's deviation is predicted ÷ measured − 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.table import Table

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


def figures(
    trace: Trace, answers: Sequence[Answered], predicted: Mapping[str, Any]
) -> list[Figure]:
    """Everything that is compared.

    Args:
        predicted: `with_pool` of a row of `plan --json`.
    """
    prompts = trace.prompt_tokens
    device = sum(answer.device_tokens for answer in answers)
    loaded = sum(answer.loaded_tokens for answer in answers)
    times_ms = 1e3 * np.array([answer.ttft_s for answer in answers])
    own_ms = predicted["ttft_ms"]
    return [
        Figure("hit rate", " %", 100 * (device + loaded) / prompts, 100 * predicted["hit_rate"]),
        Figure("device hit tokens", "", device, prompts * predicted["device_hit_rate"]),
        Figure("pool hit tokens", "", loaded, prompts * predicted["pool_hit_rate"]),
        Figure("mean TTFT", " ms", float(times_ms.mean()), own_ms["mean"]),
        Figure("p50 TTFT", " ms", float(np.percentile(times_ms, 50)), own_ms["p50"]),
        Figure("p90 TTFT", " ms", float(np.percentile(times_ms, 90)), own_ms["p90"]),
    ]


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
