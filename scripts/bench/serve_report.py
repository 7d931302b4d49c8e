# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""From samples to a report: medians, spread, ratios against the goals, and pictures.

Ratios are taken within rounds and their median is shown: what slows the machine for a round slows
both sides of its ratios.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.serve_cases import Sample

COLOURS = {
    "none": "#c8c8c8",
    "l1": "#4c78a8",
    "hicache": "#f58518",
    "ours": "#54a24b",
    "ours-lookahead": "#88d27a",
}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Lines of a result file; a last line that was cut off is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def samples(lines: Sequence[Mapping[str, Any]]) -> list[Sample]:
    """The samples among them."""
    kept = [line for line in lines if line["kind"] == "sample"]
    return [Sample(**{k: v for k, v in line.items() if k != "kind"}) for line in kept]


@dataclass(frozen=True)
class Cell:
    """What is compared: requests of one kind to one system."""

    model: str
    system: str
    case: str
    concurrency: int
    where: str
    reuse: int


@dataclass(frozen=True)
class Goal:
    """A line of the goals' table; `value` is None where it was not measured."""

    text: str
    limit: float
    value: float | None
    at_least: bool = False

    @property
    def met(self) -> bool | None:
        if self.value is None:
            return None
        return self.value >= self.limit if self.at_least else self.value <= self.limit


class Figures:
    """Samples by cell and round."""

    def __init__(self, taken: Sequence[Sample]) -> None:
        self._by_round: dict[Cell, dict[int, list[float]]] = {}
        for s in taken:
            cell = Cell(s.model, s.system, s.case, s.concurrency, s.where, s.reuse)
            rounds = self._by_round.setdefault(cell, {})
            rounds.setdefault(s.round, []).extend(s.ttft_s)
        self.models = list(dict.fromkeys(s.model for s in taken))
        self.systems = list(dict.fromkeys(s.system for s in taken))

    def cells(self) -> list[Cell]:
        return list(self._by_round)

    def ttfts_s(self, cell: Cell) -> list[float]:
        """Of all requests."""
        return [value for values in self._by_round.get(cell, {}).values() for value in values]

    def rounds(self, cell: Cell) -> dict[int, float]:
        """Median of each round."""
        return {n: statistics.median(v) for n, v in self._by_round.get(cell, {}).items()}

    def over_rounds(self, of: Callable[..., float], *cells: Cell) -> float | None:
        """Median over the rounds that have all cells of `of(their medians)`."""
        by_round = [self.rounds(cell) for cell in cells]
        common = sorted(set.intersection(*(set(rounds) for rounds in by_round)))
        if not common:
            return None
        return statistics.median(of(*(rounds[n] for rounds in by_round)) for n in common)


def single(model: str, system: str, where: str, reuse: int) -> Cell:
    """One request at a time."""
    return Cell(model, system, "single", 1, where, reuse)


def goals(figures: Figures, ours: str) -> list[Goal]:
    """The goals of this benchmark for one of our modes, one request at a time."""
    found: list[Goal] = []
    for model in figures.models:
        for reuse, limit in ((100, 1.10), (50, 1.03)):
            found += _hit_goals(figures, model, ours, reuse, limit)
        cold = [single(model, name, "within", 0) for name in (ours, "l1")]
        ratio = figures.over_rounds(lambda a, b: a / b, *cold)
        found.append(Goal(f"{model}, 0 % reuse: TTFT ours ÷ plugin off", 1.02, ratio))
    return found


def _hit_goals(figures: Figures, model: str, ours: str, reuse: int, limit: float) -> Iterator[Goal]:
    hit = single(model, ours, "cross", reuse)
    l1 = single(model, "l1", "within", reuse)
    cold = single(model, "none", "within", 0)
    rival = single(model, "hicache", "cross", reuse)
    where = f"{model}, {reuse} % reuse: "
    ratio = figures.over_rounds(lambda a, b: a / b, hit, l1)
    yield Goal(f"{where}TTFT of a pool hit ÷ L1 hit", limit, ratio)
    cut = figures.over_rounds(lambda a, b: 100 * (1 - a / b), hit, cold)
    best = figures.over_rounds(lambda a, b: 100 * (1 - a / b), l1, cold)
    text = f"{where}TTFT cut vs no cache, % (an L1 hit's less 1)"
    yield Goal(text, (best or 0) - 1, None if best is None else cut, at_least=True)
    added = figures.over_rounds(lambda a, b: a - b, hit, l1)
    theirs = figures.over_rounds(lambda a, b: a - b, rival, l1)
    share = None if added is None or not theirs else added / theirs
    yield Goal(f"{where}what a pool hit adds to an L1 hit, ours ÷ HiCache", 0.5, share)


# ---- markdown ---------------------------------------------------------------------------------


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def _spread(values: Sequence[float]) -> str:
    """Median and the middle half, in ms."""
    low, middle, high = quartiles(values)
    return f"{1e3 * middle:.0f} ({1e3 * low:.0f}–{1e3 * high:.0f})"


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile; one value is all three."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, method="inclusive")
    return low, middle, high


def markdown(run: Mapping[str, Any], figures: Figures) -> str:
    """The report's text."""
    sizes = f"prompts of {run['prompt_tokens']} tokens, pages of {run['page_size']}"
    lines = [f"Measured {run['date']}; model size {run['size']}, {sizes}.", ""]
    lines += ["TTFT in ms: median of all requests (middle half), number of requests.", ""]
    for model in figures.models:
        lines += _ttft_table(figures, model)
    lines += ["Medians over rounds of the ratios within a round, one request at a time:", ""]
    for ours in (name for name in figures.systems if name.startswith("ours")):
        lines += _table([ours, "goal", "measured", "met"], [_row(g) for g in goals(figures, ours)])
    return "\n".join(lines)


def _row(goal: Goal) -> list[str]:
    value = "not measured" if goal.value is None else f"{goal.value:.2f}"
    verdict = {True: "yes", False: "no", None: "–"}[goal.met]
    return [goal.text, f"{'≥' if goal.at_least else '≤'} {goal.limit:.2f}", value, verdict]


def _ttft_table(figures: Figures, model: str) -> list[str]:
    kinds = [c for c in figures.cells() if c.model == model]
    order = {"single": 0, "burst": 1, "trace": 2}
    places = {(order[c.case], c.case, c.concurrency, c.where, c.reuse) for c in kinds}
    rows = []
    for _, case, concurrency, where, reuse in sorted(places):
        name = f"turn {reuse} of a conversation" if case == "trace" else f"{reuse} %"
        name += "" if case == "trace" else f", {concurrency} at a time"
        cells = [Cell(model, s, case, concurrency, where, reuse) for s in figures.systems]
        taken = [figures.ttfts_s(cell) for cell in cells]
        row = [f"{_spread(v)}, {len(v)}" if v else "" for v in taken]
        rows.append([f"{where}, {name}", *row])
    return _table([model, *figures.systems], rows)


# ---- pictures ---------------------------------------------------------------------------------


def picture(figures: Figures, path: Path) -> None:
    """TTFT by kind of request, a panel per model and case: bars are medians, dots are requests."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = list(dict.fromkeys((c.model, c.case, c.concurrency) for c in figures.cells()))
    size = (11, 3.2 * len(panels))
    figure, axes = pyplot.subplots(len(panels), 1, figsize=size, squeeze=False)
    for axis, panel in zip(axes[:, 0], panels, strict=True):
        _draw(axis, figures, *panel)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _draw(axis: Any, figures: Figures, model: str, case: str, concurrency: int) -> None:
    cells = [
        c for c in figures.cells() if (c.model, c.case, c.concurrency) == (model, case, concurrency)
    ]
    kinds = sorted({(c.where != "within", c.where, c.reuse) for c in cells})
    width = 0.8 / len(figures.systems)
    for number, system in enumerate(figures.systems):
        for place, (_, where, reuse) in enumerate(kinds):
            values = figures.ttfts_s(Cell(model, system, case, concurrency, where, reuse))
            if not values:
                continue
            x = place + (number - (len(figures.systems) - 1) / 2) * width
            axis.bar(x, 1e3 * statistics.median(values), width * 0.9, color=COLOURS[system])
            axis.plot([x] * len(values), [1e3 * v for v in values], "k.", markersize=3, alpha=0.5)
    unit = "turn {}" if case == "trace" else "{} %"
    axis.set_xticks(range(len(kinds)), [f"{where}, {unit.format(n)}" for _, where, n in kinds])
    axis.set_ylabel("TTFT, ms")
    axis.set_title(f"{model}: {case}, {concurrency} at a time", fontsize=10)
    for system in figures.systems:
        axis.bar(0, 0, color=COLOURS[system], label=system)
    axis.legend(ncol=len(figures.systems), frameon=False, fontsize=8)


def write(path: Path, folder: Path) -> list[Path]:
    """Report and picture of a result file; prints the report. Returns what it wrote."""
    lines = read_lines(path)
    taken = samples(lines)
    if not taken:
        return [path]
    figures = Figures(taken)
    text = markdown(lines[0], figures)
    print(text)
    (folder / "report.md").write_text(text + "\n", encoding="utf-8")
    picture(figures, folder / "report.png")
    return [path, folder / "report.md", folder / "report.png"]
