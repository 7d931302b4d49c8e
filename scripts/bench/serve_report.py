# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""From samples to a report: medians, spread, ratios against the goals, and pictures.

Ratios are taken within rounds, and their median and middle half are shown: what slows the machine
for a round slows both sides of its ratios.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.serve_cases import Sample, Workload

COLOURS = {
    "none": "#c8c8c8",
    "l1": "#4c78a8",
    "hicache": "#f58518",
    "hicache-mooncake": "#b85c00",
    "ours": "#54a24b",
    "ours-lookahead": "#88d27a",
    "ours-packed": "#2c6b2f",
}
RIVALS = {"hicache": "HiCache", "hicache-mooncake": "HiCache on Mooncake"}


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
    """A line of the goals' table; `value` and `limit` are None where they were not measured.

    Attributes:
        by_round: what `value` is the median of; empty where it is no median.
        unknown: what is shown where there is no value.
    """

    text: str
    limit: float | None
    value: float | None
    at_least: bool = False
    by_round: Sequence[float] = ()
    unknown: str = "not measured"

    @property
    def met(self) -> bool | None:
        if self.value is None or self.limit is None:
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

    def over_rounds(self, of: Callable[..., float], *cells: Cell) -> list[float]:
        """`of(their medians)` in each round that has all cells."""
        by_round = [self.rounds(cell) for cell in cells]
        common = sorted(set.intersection(*(set(rounds) for rounds in by_round)))
        return [of(*(rounds[n] for rounds in by_round)) for n in common]


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
        ratios = figures.over_rounds(lambda a, b: a / b, *cold)
        found.append(_goal(f"{model}, 0 % reuse: TTFT ours ÷ plugin off", 1.02, ratios))
    return found


def _goal(
    text: str, limit: float | None, by_round: Sequence[float], at_least: bool = False
) -> Goal:
    return Goal(text, limit, _median(by_round), at_least, by_round)


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _hit_goals(figures: Figures, model: str, ours: str, reuse: int, limit: float) -> Iterator[Goal]:
    hit = single(model, ours, "cross", reuse)
    l1 = single(model, "l1", "within", reuse)
    cold = single(model, "none", "within", 0)
    where = f"{model}, {reuse} % reuse: "
    ratios = figures.over_rounds(lambda a, b: a / b, hit, l1)
    yield _goal(f"{where}TTFT of a pool hit ÷ L1 hit", limit, ratios)
    cut = figures.over_rounds(lambda a, b, _: 100 * (1 - a / b), hit, cold, l1)
    best = _median(figures.over_rounds(lambda _, b, c: 100 * (1 - c / b), hit, cold, l1))
    text = f"{where}TTFT cut vs no cache, % (an L1 hit's less 1)"
    yield _goal(text, None if best is None else best - 1, cut, at_least=True)
    for system, name in RIVALS.items():
        cells = (hit, single(model, system, "cross", reuse), l1)
        added = _median(figures.over_rounds(lambda a, _, c: a - c, *cells))
        theirs = _median(figures.over_rounds(lambda _, b, c: b - c, *cells))
        text = f"{where}what a pool hit adds to an L1 hit, ours ÷ {name}"
        # Of medians: in a single round, noise can make what a rival adds nothing or less.
        if added is None or theirs is None:
            yield Goal(text, 0.5, None)
        elif theirs <= 0:
            yield Goal(text, 0.5, None, unknown=f"{name} added nothing measurable")
        else:
            yield Goal(text, 0.5, added / theirs)


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


def markdown(run: Mapping[str, Any], taken: Sequence[Sample]) -> str:
    """The report's text."""
    figures = Figures(taken)
    model = f"model size {run['size']}, attention {run['attention']}"
    sizes = f"prompts of {run['prompt_tokens']} tokens, pages of {run['page_size']}"
    lines = [f"Measured {run['date']}; {model}, {sizes}.", ""]
    share = least_hit_share(run, taken)
    if share is not None:
        lines += [
            f"Every hit had at least {100 * share:.1f} % of the tokens that whole pages can have.",
            "",
        ]
    lines += ["TTFT in ms: median of all requests (middle half), number of requests.", ""]
    for model in figures.models:
        lines += _ttft_table(figures, model)
    lines += ["What a pool hit adds, ms: median of the rounds' differences (middle half).", ""]
    lines += _table(["a pool hit less …", *figures.systems], list(_added_rows(figures)))
    lines += [
        "One request at a time: each round's ratio, their median (middle half). What a hit adds is",
        "its difference to an L1 hit of the same round; there the medians are compared.",
        "",
    ]
    for ours in (name for name in figures.systems if name.startswith("ours")):
        lines += _table([ours, "goal", "measured", "met"], [_row(g) for g in goals(figures, ours)])
    return "\n".join(lines)


def least_hit_share(run: Mapping[str, Any], taken: Sequence[Sample]) -> float | None:
    """Of the tokens that a request could have from a cache, the least that any group had."""
    work = Workload(*(run[field.name] for field in dataclasses.fields(Workload)))
    return min(
        (
            sum(s.cached.values()) / (work.reusable_tokens(s.reuse) * s.concurrency)
            for s in taken
            if s.case != "trace" and work.reusable_tokens(s.reuse)
        ),
        default=None,
    )


def _row(goal: Goal) -> list[str]:
    value = goal.unknown if goal.value is None else f"{goal.value:.2f}"
    if goal.by_round:
        low, _, high = quartiles(goal.by_round)
        value += f" ({low:.2f}–{high:.2f})"
    limit = "–" if goal.limit is None else f"{'≥' if goal.at_least else '≤'} {goal.limit:.2f}"
    verdict = {True: "yes", False: "no", None: "–"}[goal.met]
    return [goal.text, limit, value, verdict]


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


def _added_rows(figures: Figures) -> Iterator[list[str]]:
    """What a pool hit adds to a device hit of a server without a pool, and to one of its own."""
    kinds = {(c.model, c.reuse) for c in figures.cells() if c.case == "single" and c.reuse}
    for model, reuse in sorted(kinds):
        for name, base in (("an L1 hit of l1", "l1"), ("one of its own", "")):
            row = []
            for system in figures.systems:
                cells = (
                    single(model, system, "cross", reuse),
                    single(model, base or system, "within", reuse),
                )
                added = figures.over_rounds(lambda a, b: a - b, *cells)
                low, middle, high = quartiles(added) if added else (0.0, 0.0, 0.0)
                text = f"{1e3 * middle:.1f} ({1e3 * low:.1f} to {1e3 * high:.1f})"
                row.append(text if added else "")
            yield [f"{name}, {model}, {reuse} %", *row]


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
    colours = [pyplot.Rectangle((0, 0), 1, 1, color=COLOURS[name]) for name in figures.systems]
    columns = {"ncol": len(figures.systems), "frameon": False, "fontsize": 9}
    figure.legend(colours, figures.systems, loc="upper center", **columns)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.25 / size[1]))
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
    axis.grid(axis="y", linewidth=0.5, alpha=0.4)
    axis.set_axisbelow(True)
    unit = "turn {}" if case == "trace" else "{} %"
    axis.set_xticks(range(len(kinds)), [f"{where}, {unit.format(n)}" for _, where, n in kinds])
    axis.set_ylabel("TTFT, ms")
    axis.set_title(f"{model}: {case}, {concurrency} at a time", fontsize=10)


def write(path: Path, folder: Path) -> list[Path]:
    """Report and picture of a result file; prints the report. Returns what it wrote."""
    lines = read_lines(path)
    taken = samples(lines)
    if not taken:
        return [path]
    text = markdown(lines[0], taken)
    print(text)
    (folder / "report.md").write_text(text + "\n", encoding="utf-8")
    picture(Figures(taken), folder / "report.png")
    return [path, folder / "report.md", folder / "report.png"]
