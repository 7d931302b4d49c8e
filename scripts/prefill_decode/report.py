# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""What the turns look like: a table in the terminal and a picture. Verdicts are two_instances'."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

from rich.console import Console
from rich.table import Table

from prefill_decode.conversations import Result, Turn

COLOURS = {"computed": "#c8c8c8", "device": "#4c78a8", "pool": "#54a24b"}


def print_table(result: Result, linked: str, plain: str, console: Console) -> None:
    """Per turn: prompt tokens by origin, and TTFT with and without decode offload."""
    table = Table(title="Turns of a conversation (mean tokens, median times)")
    for name in ("turn", "prompt tokens", "device", "pool", "computed"):
        table.add_column(name, justify="right")
    for name in (linked, plain):
        table.add_column(f"TTFT, {name}", justify="right")
    table.add_column("ratio", justify="right")
    for number in result.numbers():
        turns = result.of(linked, number)
        with_s, without_s = (result.median_ttft_s(node, number) for node in (linked, plain))
        table.add_row(
            str(number),
            f"{mean(len(turn.prompt) for turn in turns):.0f}",
            *(f"{value:.0f}" for value in _origins(turns).values()),
            f"{with_s * 1e3:.0f} ms",
            f"{without_s * 1e3:.0f} ms",
            f"{with_s / without_s:.2f} ×",
        )
    console.print(table)
    gaps = Table(title="Time between tokens")
    for name in ("decode node", "p50", "p99"):
        gaps.add_column(name, justify="left" if name == "decode node" else "right")
    for node in (linked, plain):
        gaps.add_row(node, *(f"{result.gap_ms(node, percent):.2f} ms" for percent in (50, 99)))
    ratios = (result.gap_ms(linked, p) / result.gap_ms(plain, p) for p in (50, 99))
    gaps.add_row("ratio", *(f"{ratio:.3f} ×" for ratio in ratios))
    console.print(gaps)


def _origins(turns: list[Turn]) -> dict[str, float]:
    return {
        "device": mean(turn.device_tokens for turn in turns),
        "pool": mean(turn.pool_tokens for turn in turns),
        "computed": mean(turn.computed_tokens for turn in turns),
    }


def write_picture(result: Result, linked: str, plain: str, path: Path) -> None:
    """TTFT per turn on both nodes beside where the prompt's KV came from, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, *rest) = pyplot.subplots(1, 3, figsize=(13, 4))
    numbers = result.numbers()
    for node, colour in ((linked, COLOURS["pool"]), (plain, "#f58518")):
        times_ms = [result.median_ttft_s(node, number) * 1e3 for number in numbers]
        left.plot(numbers, times_ms, "o-", color=colour, label=node)
        for turn in result.of(node):
            left.plot(turn.number, turn.ttft_s * 1e3, ".", color=colour, alpha=0.3)
    left.set(xlabel="turn", ylabel="time to first token, ms", xticks=numbers)
    left.set_ylim(bottom=0)
    left.legend(frameon=False)
    for axes, node in zip(rest, (linked, plain), strict=True):
        bottom = [0.0] * len(numbers)
        origins = [_origins(result.of(node, number)) for number in numbers]
        for tier in ("device", "pool", "computed"):
            height = [origin[tier] for origin in origins]
            axes.bar(numbers, height, bottom=bottom, color=COLOURS[tier], label=tier)
            bottom = [a + b for a, b in zip(bottom, height, strict=True)]
        axes.set(title=node, xlabel="turn", ylabel="prompt tokens (mean)", xticks=numbers)
        axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
