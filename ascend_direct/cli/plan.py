# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""`ascend-direct plan`: what a shared pool would give, before anything is bought or started.

Owns the options and the exit codes. What is computed is planning/'s, the looks are plan_report's.
"""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from ascend_direct.cli import plan_report
from ascend_direct.cli.conventions import complain, size_bytes
from ascend_direct.cli.planning import costs as cost_lines
from ascend_direct.cli.planning import forecast, validation
from ascend_direct.cli.planning.hardware import HARDWARE
from ascend_direct.cli.planning.model_shape import ModelShape, read_shape
from ascend_direct.cli.planning.routing import POLICIES
from ascend_direct.cli.planning.simulation import Fleet
from ascend_direct.cli.planning.synthetic import Synthetic, generate, read_synthetic
from ascend_direct.cli.planning.traces import Trace, read_trace
from ascend_direct.errors import ConfigError

MOST_INSTANCES = 10_000
# Of one simulation with --traffic each: a run of about half a minute.
MOST_REQUESTS = 100_000

Chip = Enum("Chip", {name: name for name in HARDWARE}, type=str)  # type: ignore[misc]
Policy = Enum("Policy", {name: name for name in POLICIES}, type=str)  # type: ignore[misc]


class Traffic(str, Enum):
    """Whose the trace's requests are."""

    ALL = "all"
    EACH = "each"


ModelConfig = Annotated[Path, typer.Option(help="Model folder, or its config.json.")]
Tp = Annotated[int, typer.Option("--tp", min=1, max=1024, help="Ranks of an instance.")]
ChipName = Annotated[Chip, typer.Option("--hardware", help="Table of costs and memory: a rank.")]
Hbm = Annotated[str, typer.Option(help="Memory of a rank; the table's by default.")]
MemFraction = Annotated[
    float, typer.Option(min=0.01, max=1.0, help="Share of it for weights and KV, as in SGLang.")
]
DeviceTokens = Annotated[
    int, typer.Option(min=0, help="KV tokens of an instance (SGLang logs it); 0: from --hbm.")
]
PoolSize = Annotated[str, typer.Option(help="Memory of all pool members together.")]
PageSize = Annotated[int, typer.Option(min=1, max=1024, help="Tokens of a page.")]
MinLoad = Annotated[
    int, typer.Option("--min-load-tokens", min=1, help="Shorter pool hits are computed.")
]
TraceFile = Annotated[
    Path | None, typer.Option("--trace", help="Requests, as Mooncake's traces (JSON lines).")
]
BlockTokens = Annotated[int, typer.Option(min=1, help="Tokens a hash id of the trace stands for.")]
InSeconds = Annotated[bool, typer.Option("--seconds", help="Timestamps are seconds, not ms.")]
Made = Annotated[
    str | None,
    typer.Option(
        "--synthetic",
        help="Without --trace: conversations to make up, JSON or @file of "
        f"{', '.join(Synthetic.model_fields)}.",
    ),
]
Instances = Annotated[str, typer.Option(help="Numbers of instances, with commas.")]
Whose = Annotated[
    Traffic, typer.Option("--traffic", help="The requests are of all instances, or of each.")
]
Routing = Annotated[Policy, typer.Option("--routing", help="How requests are spread.")]
Batch = Annotated[int, typer.Option(min=1, help="Tokens of a prefill: --chunked-prefill-size.")]
CostFile = Annotated[
    str | None,
    typer.Option(
        "--costs",
        help="Measured costs over the table's, JSON or @file of "
        f"{', '.join(cost_lines.CostOptions.model_fields)}.",
    ),
]
Plot = Annotated[Path | None, typer.Option(help="Also draw it, to this PNG (needs matplotlib).")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object.")]


def plan(
    model_config: ModelConfig,
    tp: Tp = 1,
    hardware: ChipName = Chip("a3"),  # noqa: B008  a constant
    hbm: Hbm = "",
    mem_fraction: MemFraction = 0.85,
    device_tokens: DeviceTokens = 0,
    pool_size: PoolSize = "1TB",
    page_size: PageSize = 128,
    min_load_tokens: MinLoad = 128,
    trace: TraceFile = None,
    block_tokens: BlockTokens = 512,
    seconds: InSeconds = False,
    synthetic: Made = None,
    instances: Instances = "1,2,4,8,16,32,64,128,256,512,1000",
    traffic: Whose = Traffic.ALL,
    routing: Routing = Policy("round-robin"),  # noqa: B008  a constant
    batch_tokens: Batch = 8192,
    costs: CostFile = None,
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Predict hit rates, time to first token and pool traffic of 1 … 1,000 instances on one pool.

    Replays requests on simulated instances, with the pool and without. --traffic all: the trace is
    what all instances are asked together; how many are needed? --traffic each: every instance is
    asked as much as the trace has, other prompts but for system prompts; what must the pool bear?

    Costs are table values of published figures (not measured by us) unless --costs gives measured
    ones; an unknown name in it lists the known. The output says how far plan has been validated.

    Exit codes: 0 planned; 2 an option, the model, the trace or the costs are wrong.
    """
    given = dict(locals())
    try:
        plan_report.check_plot(plot)
        found = _planned(given)
        typer.echo(json.dumps(found) if as_json else plan_report.text(found))
        if plot is not None:
            plan_report.draw(found, plot)
    except ConfigError as error:
        raise typer.Exit(complain(error)) from None


def _planned(given: dict[str, Any]) -> dict[str, Any]:
    """Everything, as the JSON has it.

    Raises:
        ConfigError: the options cannot be planned.
    """
    shape = read_shape(given["model_config"])
    counts = _counts(given["instances"])
    question = _question(given, shape)
    fleet = question.fleet
    return {
        "model": _model(shape, given["tp"]),
        "trace": _about(question.trace),
        "fleet": {
            "hardware": given["hardware"].value,
            "tp": given["tp"],
            "device_tokens": fleet.device_tokens,
            "pool_bytes": fleet.pool_tokens * shape.kv_bytes_per_token,
            "routing": fleet.policy,
            "traffic": given["traffic"].value,
        },
        "costs": question.costs.model_dump(),
        "break_even": forecast.break_even(question),
        "pool_sizes": forecast.pool_sizes(question),
        "rows": list(forecast.rows(question, counts)),
        "validation": validation.record(),
        "validated": validation.sentence(validation.record()),
    }


def _question(given: dict[str, Any], shape: ModelShape) -> forecast.Question:
    tp_size, hardware = given["tp"], given["hardware"].value
    rank_bytes = shape.rank_kv_bytes_per_token(tp_size)
    wire_bytes = cost_lines.wire_bytes_per_token(shape, tp_size, hardware)
    costs = cost_lines.table_costs(shape, tp_size, hardware)
    if given["costs"] is not None:
        costs = cost_lines.read_costs(given["costs"], costs, rank_bytes, wire_bytes)
    fleet = Fleet(
        instances=1,
        device_tokens=_device_tokens(given, shape, rank_bytes),
        pool_tokens=size_bytes("--pool-size", given["pool_size"]) // shape.kv_bytes_per_token,
        min_load_tokens=given["min_load_tokens"],
        batch_tokens=given["batch_tokens"],
        policy=given["routing"].value,
    )
    trace = _trace(given)
    _check_lengths(trace, fleet)
    return forecast.Question(
        trace,
        fleet,
        costs,
        shape.kv_bytes_per_token,
        wire_bytes,
        scaled=given["traffic"] is Traffic.EACH,
        most_requests=MOST_REQUESTS,
    )


def _counts(text: str) -> list[int]:
    try:
        counts = sorted({int(part) for part in text.split(",")})
    except ValueError:
        counts = [0]
    if not 1 <= counts[0] <= counts[-1] <= MOST_INSTANCES:
        raise ConfigError(
            [f"--instances {text}: use whole numbers of 1 … {MOST_INSTANCES}, as in 1,2,4."]
        )
    return counts


def _trace(given: dict[str, Any]) -> Trace:
    if given["trace"] is None:
        return generate(read_synthetic(given["synthetic"]), given["page_size"])
    if given["synthetic"] is not None:
        raise ConfigError(["--trace and --synthetic: give one of them."])
    return read_trace(given["trace"], given["block_tokens"], given["page_size"], given["seconds"])


def _device_tokens(given: dict[str, Any], shape: ModelShape, rank_bytes: int) -> int:
    if given["device_tokens"]:
        return int(given["device_tokens"])
    table = HARDWARE[given["hardware"].value]
    hbm = size_bytes("--hbm", given["hbm"]) if given["hbm"] else table.hbm_bytes
    weights = shape.weight_bytes // given["tp"]
    room: int = int(hbm * given["mem_fraction"]) - weights
    if room < rank_bytes * given["page_size"]:
        why = f"weights of {weights / 1e9:.0f} GB a rank leave no room for KV in {hbm / 1e9:.0f} GB"
        share = f"{given['mem_fraction']:g}"
        raise ConfigError([f"{why} x {share}: raise --tp, or give --device-tokens."])
    return room // rank_bytes


def _check_lengths(trace: Trace, fleet: Fleet) -> None:
    longest = max(request.prompt_tokens for request in trace.requests)
    if longest > fleet.device_tokens:
        why = f"the longest prompt has {longest} tokens, an instance holds {fleet.device_tokens}"
        raise ConfigError([f"{why}: raise --tp or --device-tokens, or cut the trace."])


def _model(shape: ModelShape, tp: int) -> dict[str, Any]:
    return {
        "name": shape.name,
        "attention": "MLA" if shape.is_mla else "GQA",
        "weights": shape.weights,
        "active_weights": shape.active_weights,
        "kv_bytes_per_token": shape.kv_bytes_per_token,
        "rank_kv_bytes_per_token": shape.rank_kv_bytes_per_token(tp),
        "tp": tp,
    }


def _about(trace: Trace) -> dict[str, Any]:
    return {
        "name": trace.name,
        "requests": len(trace.requests),
        "span_s": trace.span_s,
        "prompt_tokens": trace.prompt_tokens,
        "unit_tokens": trace.unit_tokens,
        "page_tokens": trace.page_tokens,
        "notes": list(trace.notes),
    }
