# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""From the lines of scripts/bench/transfer to tables, goals and pictures.

Ratios are taken within rounds and their median is shown: what slows the machine for a round slows
both sides of its ratios.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from bench.serve_report import Goal, read_lines
from bench.shapes import SHAPES

GIB, MIB = 2**30, 2**20
Line = Mapping[str, Any]
# Pages from which on the goals for loads and stores hold.
GOAL_PAGES = 8
# A first column of longer texts may be wrapped.
NAME_LENGTH = 32
MAIN_WAYS = ("memcpy", "bare get", "bare get, other thread", "load", "bare put", "store")
MEMOISED = "lookup, memoised"


@dataclass(frozen=True)
class Table:
    """One table, for the terminal and for Markdown."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def rich(self) -> RichTable:
        """For the terminal."""
        table = RichTable(title=self.title, title_justify="left")
        for number, name in enumerate(self.head):
            names = not number and max(len(row[0]) for row in self.rows) < NAME_LENGTH
            table.add_column(name, justify="right" if number else "left", no_wrap=names)
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """For a document."""
        lines = [self.title, "", "| " + " | ".join(self.head) + " |", "|---" * len(self.head) + "|"]
        return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in self.rows), ""])


def ratio(seconds: Mapping[str, Sequence[float]], base: str, name: str) -> float:
    """How much of `base`'s speed `name` has: the median over rounds, so that noise common to a
    round cancels."""
    return statistics.median(b / n for b, n in zip(seconds[base], seconds[name], strict=True))


def tables(lines: Sequence[Line]) -> Iterator[Table]:
    """What there is to show of these lines."""
    moved = [line for line in lines if line["kind"] == "move"]
    if moved:
        yield _moves(moved)
        yield from _other_ways(moved)
    looked = [line for line in lines if line["kind"] == "lookup"]
    if looked:
        yield _lookups(looked)
    threads = [line for line in lines if line["kind"] == "thread"]
    if threads:
        yield _threads(threads)
    facts = [fact for line in lines for fact in _facts(line)]
    if facts:
        yield Table("Besides", ("what", "measured"), facts)
    reached = list(goals(lines))
    if reached:
        rows = [_goal_row(goal) for goal in reached]
        yield Table("Goals", ("goal", "limit", "measured", "met"), rows)


def _moves(lines: Sequence[Line]) -> Table:
    head = ["page of", "pages", "MiB", "memcpy", "bare get", "load", "÷", "adds µs"]
    head += ["of that, a thread", "bare put", "store", "÷", "adds µs"]
    rows = []
    for line in lines:
        seconds = line["seconds"]
        size_bytes = line["pages"] * SHAPES[line["shape"]].page_bytes
        rate = {
            way: f"{size_bytes / GIB / statistics.median(seconds[way]):.1f}" for way in MAIN_WAYS
        }
        rows.append(
            [
                line["shape"],
                f"{line['pages']:,}",
                f"{size_bytes / MIB:,.1f}",
                *(rate[way] for way in ("memcpy", "bare get", "load")),
                f"{ratio(seconds, 'bare get', 'load'):.2f}",
                _added(seconds, "bare get", "load"),
                _added(seconds, "bare get", "bare get, other thread"),
                *(rate[way] for way in ("bare put", "store")),
                f"{ratio(seconds, 'bare put', 'store'):.2f}",
                _added(seconds, "bare put", "store"),
            ]
        )
    return Table("GiB/s, medians; ÷ and µs against the bare call in the same round", head, rows)


def _added(seconds: Mapping[str, Sequence[float]], base: str, name: str) -> str:
    """Microseconds on top of `base`."""
    added = (n - b for b, n in zip(seconds[base], seconds[name], strict=True))
    return f"{1e6 * statistics.median(added):,.0f}"


def _other_ways(lines: Sequence[Line]) -> Iterator[Table]:
    ways = list(dict.fromkeys(way for line in lines for way in line["seconds"]))
    ways = [way for way in ways if way not in MAIN_WAYS]
    rows = []
    for line in lines:
        seconds = line["seconds"]
        cells = [f"{ratio(seconds, 'bare get', w):.2f}" if w in seconds else "" for w in ways]
        if any(cells):
            own = f"{ratio(seconds, 'bare get', 'load'):.2f}"
            rows.append([line["shape"], f"{line['pages']:,}", own, *cells])
    if rows:
        title = "Other ways to read: speed ÷ the bare call's in the same round"
        yield Table(title, ["page of", "pages", "load", *ways], rows)


def _lookups(lines: Sequence[Line]) -> Table:
    ways = list(lines[0]["seconds"])
    rows = [
        [
            f"{line['stored']:,}",
            f"{line['asked']:,}",
            *(f"{1e6 * statistics.median(line['seconds'][way]):,.0f}" for way in ways),
        ]
        for line in sorted(lines, key=lambda line: (line["asked"], line["stored"]))
    ]
    return Table("Lookups: µs, medians", ["keys stored", "keys asked", *ways], rows)


def _threads(lines: Sequence[Line]) -> Table:
    whats = list(lines[0]["us"])
    rows = [[what, *(_spread(line["us"][what]) for line in lines)] for what in whats]
    title = "Scheduler thread, native calls not counted unless said: µs, medians (largest)"
    return Table(title, ["what", *(f"{line['pages']:,} pages" for line in lines)], rows)


def _spread(values: Sequence[float]) -> str:
    digits = 1 if max(values) < 100 else 0
    return f"{statistics.median(values):,.{digits}f} ({max(values):,.{digits}f})"


def _facts(line: Line) -> Iterator[tuple[str, str]]:
    if line["kind"] == "fill":
        yield f"put, {line['stored']:,} keys", f"{line['put_us_per_key']:.0f} µs a key"
    if line["kind"] == "beliefs":
        size = f"{line['bytes'] / MIB:.0f} MiB, {line['bytes_per_key']:.0f} bytes a key"
        yield f"{line['pages']:,} beliefs", size
    if line["kind"] == "members":
        total = sum(line["used_bytes"])
        shares = ", ".join(f"{100 * used / max(1, total):.0f} %" for used in line["used_bytes"])
        yield f"one put of {line['objects']} objects, bytes by member", shares


# ---- goals ------------------------------------------------------------------------------------


def goals(lines: Sequence[Line]) -> Iterator[Goal]:
    """What was to be reached, for what was measured."""
    for ours, bare in (("load", "bare get"), ("store", "bare put")):
        speeds = {
            f"{line['pages']} pages of {line['shape']}": ratio(line["seconds"], bare, ours)
            for line in lines
            if line["kind"] == "move" and line["pages"] >= GOAL_PAGES
        }
        if speeds:
            slowest = min(speeds, key=speeds.__getitem__)
            met = sum(speed >= 0.95 for speed in speeds.values())
            text = f"{ours} ÷ {bare}, {GOAL_PAGES} pages or more; {met} of {len(speeds)} reach it"
            yield Goal(f"{text}; the worst is {slowest}", 0.95, speeds[slowest], at_least=True)
    threads = [line for line in lines if line["kind"] == "thread"]
    if threads:
        worst = max(statistics.median(line["us"][MEMOISED]) for line in threads)
        yield Goal("scheduler thread per waiting request and round, memoised, µs", 50, worst)
    yield from _lookup_goals([line for line in lines if line["kind"] == "lookup"])


def _lookup_goals(lines: Sequence[Line]) -> Iterator[Goal]:
    if len({line["stored"] for line in lines}) < 2:
        return
    least, most = (f(line["stored"] for line in lines) for f in (min, max))
    by_size = {(line["stored"], line["asked"]): line["seconds"] for line in lines}
    for asked in dict.fromkeys(line["asked"] for line in lines):
        few, many = by_size[least, asked], by_size[most, asked]
        for way in ("ours, all there", "bare, all there"):
            cost = statistics.median(m / f for f, m in zip(few[way], many[way], strict=True))
            text = f"lookup of {asked:,} keys, {way}: {most:,} stored ÷ {least:,}"
            yield Goal(text, 1.3, cost)


def _goal_row(goal: Goal) -> list[str]:
    limit = f"{'≥' if goal.at_least else '≤'} {goal.limit:g}"
    return [goal.text, limit, f"{goal.value:.2f}", "yes" if goal.met else "no"]


# ---- pictures ---------------------------------------------------------------------------------


def picture(lines: Sequence[Line], path: Path) -> None:
    """Speed and ratios by size of the transfer, lookups by keys stored, the scheduler's thread."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(12, 8.5))
    moved = [line for line in lines if line["kind"] == "move"]
    _draw_speeds(axes[0, 0], moved)
    _draw_ratios(axes[0, 1], moved)
    _draw_lookups(axes[1, 0], [line for line in lines if line["kind"] == "lookup"])
    _draw_threads(axes[1, 1], [line for line in lines if line["kind"] == "thread"])
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _size_mib(line: Line) -> float:
    return float(line["pages"] * SHAPES[line["shape"]].page_bytes / MIB)


def _draw_speeds(axis: Any, moved: Sequence[Line]) -> None:
    """Of the shape with most numbers of pages."""
    counts = [line["shape"] for line in moved]
    shape = max(dict.fromkeys(counts), key=counts.count, default="")
    curve = sorted((line for line in moved if line["shape"] == shape), key=_size_mib)
    ways = [way for way in MAIN_WAYS if way != "bare get, other thread"]
    for way in ways if curve else []:
        speeds = [_size_mib(n) / 1024 / statistics.median(n["seconds"][way]) for n in curve]
        style = "--" if "bare" in way else ":" if way == "memcpy" else "-"
        colour = {"bare get": "C0", "load": "C0", "bare put": "C1", "store": "C1"}.get(way, "grey")
        axis.plot([n["pages"] for n in curve], speeds, style, color=colour, marker=".", label=way)
    _finish(axis, f"{shape or 'moves'}: speed", "pages", "GiB/s", log_x=True)


def _draw_ratios(axis: Any, moved: Sequence[Line]) -> None:
    for number, shape in enumerate(dict.fromkeys(line["shape"] for line in moved)):
        curve = sorted((line for line in moved if line["shape"] == shape), key=_size_mib)
        for base, way, style in (("bare get", "load", "-"), ("bare put", "store", ":")):
            speeds = [ratio(line["seconds"], base, way) for line in curve]
            label = shape if way == "load" else None
            sizes = [_size_mib(line) for line in curve]
            axis.plot(sizes, speeds, style, color=f"C{number}", marker=".", label=label)
    axis.axhline(0.95, color="black", linewidth=0.7)
    title = "load (—) and store (···) ÷ the bare call; the goal is 0.95"
    _finish(axis, title, "MiB of the transfer", "share of the speed", log_x=True)


def _draw_lookups(axis: Any, looked: Sequence[Line]) -> None:
    for number, asked in enumerate(dict.fromkeys(line["asked"] for line in looked)):
        curve = sorted((n for n in looked if n["asked"] == asked), key=lambda n: n["stored"])
        for way, style in (("ours, all there", "-"), ("bare, all there", "--")):
            times = [1e6 * statistics.median(line["seconds"][way]) for line in curve]
            label = f"{way}, {asked:,} keys"
            stored = [line["stored"] for line in curve]
            axis.plot(stored, times, style, color=f"C{number}", marker=".", label=label)
    axis.set_ylim(bottom=0)
    _finish(axis, "a lookup", "keys in the pool", "µs", log_x=True)


def _draw_threads(axis: Any, threads: Sequence[Line]) -> None:
    for number, line in enumerate(threads):
        own = [what for what in line["us"] if "with the pool" not in what]
        medians = [statistics.median(line["us"][what]) for what in own]
        places = [place + 0.4 * number for place in range(len(own))]
        axis.barh(places, medians, 0.38, label=f"{line['pages']:,} pages")
        axis.set_yticks([place + 0.2 for place in range(len(own))], own, fontsize=8)
    if threads:
        axis.set_xscale("log")
        axis.axvline(50, color="black", linewidth=0.7)
        axis.invert_yaxis()
    _finish(axis, "scheduler thread, native calls not counted", "µs; the line is 50", "")


def _finish(axis: Any, title: str, x: str, y: str, *, log_x: bool = False) -> None:
    if log_x and axis.lines:
        axis.set_xscale("log")
    axis.set(title=title, xlabel=x, ylabel=y)
    axis.title.set_fontsize(10)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, fontsize=8)


def write(path: Path, folder: Path, console: Console) -> list[Path]:
    """Report and picture of a result file; shows the report. Returns what it wrote."""
    lines = read_lines(path)
    made = list(tables(lines))
    if not made:
        return [path]
    for table in made:
        console.print(table.rich())
    text = f"{json.dumps(lines[0])}\n\n" + "\n".join(table.markdown() for table in made)
    (folder / "report.md").write_text(text, encoding="utf-8")
    picture(lines, folder / "report.png")
    return [path, folder / "report.md", folder / "report.png"]
