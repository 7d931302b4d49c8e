# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""The figures of a plan: one row per number of instances, the use of pool sizes, break-even.

Owns what is computed from simulations and from costs, as plain data (the JSON of `plan --json`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ascend_direct.cli.planning.costs import Costs
from ascend_direct.cli.planning.lru import Lru
from ascend_direct.cli.planning.simulation import Fleet, Outcome, Simulation, slice_peak
from ascend_direct.cli.planning.traces import Trace, copies

GB = 1e9
# Of the time that a server prefills; above it the queue grows as long as requests come.
OVERLOADED = 0.98
# Fewer requests than this, and what an instance computes first weighs too much.
FEW_REQUESTS = 20
CURVE_STEPS = 8
LENGTH_SHARES = (0.5, 0.9)


@dataclass(frozen=True)
class Question:
    """All that a plan is computed from.

    Attributes:
        kv_bytes_per_token: in the pool.
        wire_bytes_per_token: what leaves the pool for a token that is loaded.
        scaled: each instance gets the whole trace's traffic, instead of all together.
        most_requests: of a simulation with `scaled`.
    """

    trace: Trace
    fleet: Fleet
    costs: Costs
    kv_bytes_per_token: int
    wire_bytes_per_token: int
    scaled: bool
    most_requests: int

    def traffic(self, instances: int) -> Trace:
        """What so many instances are asked."""
        return copies(self.trace, instances, self.most_requests) if self.scaled else self.trace


def rows(question: Question, counts: list[int]) -> Iterator[dict[str, Any]]:
    """A row for each number of instances, each as soon as it is done."""
    for count in counts:
        trace = question.traffic(count)
        fleet = replace(question.fleet, instances=count)
        linked = Simulation(trace, fleet, question.costs).run()
        alone = Simulation(trace, replace(fleet, pool_tokens=0), question.costs).run()
        yield {
            "instances": count,
            "requests": len(trace.requests),
            "requests_per_s": _rate(len(trace.requests), trace.span_s),
            "few_requests": len(trace.requests) < FEW_REQUESTS * count,
            "with_pool": {
                **_served(trace, linked, count),
                "pool": _traffic(question, trace, linked),
            },
            "without_pool": _served(trace, alone, count),
        }


def _rate(amount: float, seconds: float) -> float:
    return amount / seconds if seconds > 0 else 0.0


def _served(trace: Trace, outcome: Outcome, instances: int) -> dict[str, Any]:
    """Hit rates are shares of all prompt tokens."""
    prompts = trace.prompt_tokens
    device, pool = sum(outcome.device_tokens), sum(outcome.loaded_tokens)
    ttft_ms = 1e3 * np.frombuffer(outcome.ttft_s)
    busy = _rate(outcome.busy_s, instances * (outcome.end_s - trace.requests[0].arrival_s))
    return {
        "hit_rate": (device + pool) / prompts,
        "device_hit_rate": device / prompts,
        "pool_hit_rate": pool / prompts,
        "ttft_ms": {
            "mean": float(ttft_ms.mean()),
            **{f"p{p}": float(np.percentile(ttft_ms, p)) for p in (50, 90, 99)},
        },
        "busy": busy,
        "overloaded": _rate(outcome.busy_s, instances * trace.span_s) > OVERLOADED,
    }


def _traffic(question: Question, trace: Trace, outcome: Outcome) -> dict[str, Any]:
    start_s, end_s = trace.requests[0].arrival_s, outcome.end_s
    read, written = question.wire_bytes_per_token / GB, question.kv_bytes_per_token / GB
    return {
        "read_gb_per_s": read * _rate(sum(outcome.loaded_tokens), end_s - start_s),
        "read_peak_gb_per_s": read * slice_peak(outcome.loads, start_s, end_s),
        "written_gb_per_s": written * _rate(outcome.stored_tokens, end_s - start_s),
        "written_peak_gb_per_s": written * slice_peak(outcome.stores, start_s, end_s),
        "peak_bytes": outcome.pool_peak_tokens * question.kv_bytes_per_token,
        "written_bytes": outcome.stored_tokens * question.kv_bytes_per_token,
        "evicted_bytes": outcome.pool_evicted_tokens * question.kv_bytes_per_token,
    }


def reusable_tokens(trace: Trace, capacity_tokens: float) -> tuple[int, int]:
    """(tokens that one cache of this size has of the prompts, most tokens it held).

    As if each request had been computed before the next one came.
    """
    cache, unit_tokens, hits = Lru(capacity_tokens), trace.unit_tokens, 0
    for request in trace.requests:
        units = request.units
        matched = cache.matched(units)
        tokens = matched * unit_tokens
        if units and matched == len(units):
            most = (request.prompt_tokens - 1) // trace.page_tokens * trace.page_tokens
            tokens = min(tokens - unit_tokens + request.last_tokens, most)
        hits += tokens
        if units:
            cache.use(units[:-1], unit_tokens)
            cache.use_one(units[-1], request.last_tokens)
        cache.use(request.answer_units, unit_tokens)
        cache.make_room()
    return hits, cache.peak_tokens


def pool_sizes(question: Question) -> dict[str, Any]:
    """How much of all prompt tokens pools of several sizes could give, at the best."""
    trace = question.trace
    hits, most_tokens = reusable_tokens(trace, float("inf"))
    whole_bytes = most_tokens * question.kv_bytes_per_token
    curve = []
    for step in range(CURVE_STEPS, -1, -1):
        share = 2.0**-step
        found = hits if not step else reusable_tokens(trace, share * most_tokens)[0]
        curve.append({"bytes": int(share * whole_bytes), "reuse_rate": found / trace.prompt_tokens})
    enough = next(point for point in curve if point["reuse_rate"] >= 0.95 * curve[-1]["reuse_rate"])
    return {"reuse_rate": curve[-1]["reuse_rate"], "enough_bytes": enough["bytes"], "curve": curve}


def break_even(question: Question) -> dict[str, Any]:
    """From how much reuse on a load is faster than computing, by length of the prompt."""
    trace, costs = question.trace, question.costs
    page_tokens = trace.page_tokens
    prompts = []
    for share in LENGTH_SHARES:
        length = trace.prompt_quantile(share)
        tokens = costs.break_even_tokens(length, page_tokens)
        prompts.append(
            {
                "prompt_tokens": length,
                "quantile": share,
                "tokens": tokens,
                "share": None if tokens is None else tokens / length,
                "saved_ms_at_full_reuse": 1e3 * costs.saved_s(length, _most(length, page_tokens)),
            }
        )
    return {"page_tokens": page_tokens, "prompts": prompts}


def _most(prompt_tokens: int, page_tokens: int) -> int:
    return (prompt_tokens - 1) // page_tokens * page_tokens
