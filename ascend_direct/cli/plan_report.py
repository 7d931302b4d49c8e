# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""How `ascend-direct plan` looks: a table and sentences, or four panels of a picture.

Owns looks only; every figure comes in as plain data.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ascend_direct.errors import ConfigError

WIDTH = 150
HEADS = (
    "instances",
    "req/s",
    "hit device + pool",
    "alone",
    "TTFT p50 / p90 / p99",
    "alone",
    "GB/s read / written",
    "in pool",
    "busy",
    "",
)


def check_plot(path: Path | None) -> None:
    """Fail before the work, not after.

    Raises:
        ConfigError: matplotlib is not installed, or there is no such folder.
    """
    if path is None:
        return
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(["--plot needs matplotlib: pip install matplotlib, or leave --plot out."])
    if not path.absolute().parent.is_dir():
        raise ConfigError([f"--plot {path}: there is no folder {path.absolute().parent}."])


def text(found: dict[str, Any]) -> str:
    """For people."""
    console = Console(highlight=False, width=WIDTH)
    with console.capture() as capture:
        for line in _before(found):
            console.print(line, markup=False, soft_wrap=True)
        console.print(_table(found["rows"]))
        for line in _after(found):
            console.print(line, markup=False, soft_wrap=True)
    return capture.get().rstrip()


def _size(size_bytes: float) -> str:
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.3g} {unit}"
    return f"{size_bytes:.0f} B"


def _time(value_ms: float) -> str:
    return f"{_figure(value_ms / 1e3)} s" if value_ms >= 1e3 else f"{_figure(value_ms)} ms"


def _before(found: dict[str, Any]) -> list[str]:
    model, trace, fleet = found["model"], found["trace"], found["fleet"]
    mean = trace["prompt_tokens"] / trace["requests"]
    whose = "of all instances" if fleet["traffic"] == "all" else "of each instance"
    lines = [
        f"{model['name']}: {model['attention']}, {model['weights'] / 1e9:.3g}B weights, ",
        f"{trace['name']}: {trace['requests']} requests in {trace['span_s']:.0f} s, ",
        f"an instance holds {fleet['device_tokens']} tokens, the pool ",
        f"costs: {found['costs']['source']}",
    ]
    lines[0] += f"{model['kv_bytes_per_token']} bytes of KV a token, "
    lines[0] += f"{model['rank_kv_bytes_per_token']} on each of {fleet['tp']} ranks"
    lines[1] += f"{mean:.0f} prompt tokens on average, traffic {whose}"
    lines[2] += f"{_size(fleet['pool_bytes'])}; requests go {fleet['routing']}"
    return [*lines, *trace["notes"]]


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table()
    for head in HEADS:
        table.add_column(head, justify="right")
    for row in rows:
        linked, alone = row["with_pool"], row["without_pool"]
        pool = linked["pool"]
        table.add_row(
            f"{row['instances']:,}",
            _figure(row["requests_per_s"]),
            f"{_percent(linked['device_hit_rate'])} + {_percent(linked['pool_hit_rate'])}",
            _percent(alone["hit_rate"]),
            _quantiles(linked["ttft_ms"]),
            _quantiles(alone["ttft_ms"]),
            f"{_figure(pool['read_gb_per_s'])} / {_figure(pool['written_gb_per_s'])}",
            _size(pool["peak_bytes"]),
            f"{100 * linked['busy']:.0f} %",
            "".join(mark for mark, is_so in _marks(row) if is_so),
        )
    return table


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _figure(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _quantiles(ttft_ms: dict[str, float]) -> str:
    return " / ".join(_time(ttft_ms[p]) for p in ("p50", "p90", "p99"))


def _marks(row: dict[str, Any]) -> list[tuple[str, bool]]:
    return [
        ("*", row["with_pool"]["overloaded"]),
        ("°", row["without_pool"]["overloaded"]),
        ("'", row["few_requests"]),
    ]


MARKS = {
    "*": "* overloaded: the queue grows as long as requests come, TTFT says little",
    "°": "° overloaded without the pool",
    "'": "' fewer than 20 requests an instance: what is cold at the start weighs much",
}


def _after(found: dict[str, Any]) -> list[str]:
    seen = {mark for row in found["rows"] for mark, is_so in _marks(row) if is_so}
    lines = [note for mark, note in MARKS.items() if mark in seen]
    lines.append(
        "alone: without a pool; hits are shares of all prompt tokens; GB/s on average, in pool at "
        "the most"
    )
    sizes = found["pool_sizes"]
    lines.append(
        f"{100 * sizes['reuse_rate']:.1f} % of the prompt tokens could be reused at best; a pool "
        f"of {_size(sizes['enough_bytes'])} can give 95 % of that"
    )
    lines += [_even(prompt) for prompt in found["break_even"]["prompts"]]
    return [*lines, found["validated"]]


def _even(prompt: dict[str, Any]) -> str:
    length = f"prompts of {prompt['prompt_tokens']} tokens (p{100 * prompt['quantile']:.0f})"
    if prompt["tokens"] is None:
        return f"{length}: loading never beats computing"
    return (
        f"{length}: a load beats computing from {prompt['tokens']} tokens on "
        f"({100 * prompt['share']:.1f} % reuse); all of it saves "
        f"{_time(prompt['saved_ms_at_full_reuse'])}"
    )


# ---- picture ----------------------------------------------------------------------------------

DEVICE, POOL, ALONE = "#4477aa", "#228833", "#aa3377"


def draw(found: dict[str, Any], path: Path) -> None:
    """Hit rates, TTFT and traffic over the number of instances; reuse over the size of the pool.

    Raises:
        ConfigError: the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(12, 8))
    counts = [row["instances"] for row in found["rows"]]
    _draw_hits(axes[0, 0], counts, found)
    _draw_ttft(axes[0, 1], counts, found["rows"])
    _draw_traffic(axes[1, 0], counts, found["rows"])
    _draw_sizes(axes[1, 1], found)
    for axis in (axes[0, 0], axes[0, 1], axes[1, 0]):
        axis.set_xscale("log", base=2)
        axis.set_xticks(counts, [f"{count:,}" for count in counts], rotation=45)
        axis.minorticks_off()
        axis.set_xlabel("instances")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, frameon=False)
    figure.suptitle(f"{found['model']['name']}, {found['trace']['name']}", fontsize=12)
    figure.text(0.01, 0.005, _footnote(found), fontsize=7, va="bottom", wrap=True)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    try:
        figure.savefig(path, dpi=110, format="png")
    except OSError as error:
        raise ConfigError([f"--plot {path}: {error}."]) from None
    finally:
        pyplot.close(figure)


def _footnote(found: dict[str, Any]) -> str:
    return f"costs: {found['costs']['source']}\n{found['validated']}"


def _draw_hits(axis: Any, counts: list[int], found: dict[str, Any]) -> None:
    rows = found["rows"]
    device = [100 * row["with_pool"]["device_hit_rate"] for row in rows]
    total = [100 * row["with_pool"]["hit_rate"] for row in rows]
    alone = [100 * row["without_pool"]["hit_rate"] for row in rows]
    axis.fill_between(counts, device, color=DEVICE, alpha=0.6, label="from the device")
    axis.fill_between(counts, device, total, color=POOL, alpha=0.6, label="from the pool")
    axis.plot(counts, alone, "o-", color=ALONE, label="without a pool")
    best = 100 * found["pool_sizes"]["reuse_rate"]
    axis.axhline(best, color="black", linestyle=":", label="could be reused at best")
    axis.set_ylim(0, max(best, 1) * 1.15)
    axis.set_ylabel("% of prompt tokens")
    axis.set_title("Hit rate")


def _draw_ttft(axis: Any, counts: list[int], rows: list[dict[str, Any]]) -> None:
    for key, colour, name in (
        ("with_pool", POOL, "with the pool"),
        ("without_pool", ALONE, "without"),
    ):
        for quantile, style in (("p50", "-"), ("p90", "--"), ("p99", ":")):
            values = [row[key]["ttft_ms"][quantile] for row in rows]
            axis.plot(counts, values, style, color=colour, label=f"{quantile} {name}")
        crowded = [row for row in rows if row[key]["overloaded"]]
        axis.plot(
            [row["instances"] for row in crowded],
            [row[key]["ttft_ms"]["p50"] for row in crowded],
            "x",
            color=colour,
            label=f"overloaded {name}" if crowded else None,
        )
    axis.set_yscale("log")
    axis.set_ylabel("ms")
    axis.set_title("Time to first token")


def _draw_traffic(axis: Any, counts: list[int], rows: list[dict[str, Any]]) -> None:
    for way, colour in (("read", DEVICE), ("written", POOL)):
        for key, style in (("", "-"), ("_peak", ":")):
            values = [row["with_pool"]["pool"][f"{way}{key}_gb_per_s"] for row in rows]
            name = "busiest 1 % of the time" if key else "on average"
            axis.plot(counts, values, style, color=colour, label=f"{way}, {name}")
    axis.set_ylim(bottom=0)
    axis.set_ylabel("GB/s")
    axis.set_title("Traffic of the pool")


def _draw_sizes(axis: Any, found: dict[str, Any]) -> None:
    curve = found["pool_sizes"]["curve"]
    sizes = [max(point["bytes"], 1) / 1e9 for point in curve]
    axis.plot(sizes, [100 * point["reuse_rate"] for point in curve], "o-", color=POOL, label="LRU")
    given = found["fleet"]["pool_bytes"] / 1e9
    if given:
        axis.axvline(given, color="black", linestyle=":", label="this plan's pool")
    axis.set_xscale("log")
    axis.set_ylim(bottom=0)
    axis.set_xlabel("size of the pool, GB")
    axis.set_ylabel("% of prompt tokens")
    axis.set_title("What a pool of a size can give at best")
