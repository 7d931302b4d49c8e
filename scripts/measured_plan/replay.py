# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""A trace sent to two real servers, turn about, each request when it is due.

Owns the tokens behind a trace's units, the clock and what is noted of each answer.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

from sglang_cpu.client import SGLangClient
from two_instances.run import FIRST_TOKEN, LAST_TOKEN

from ascend_direct.cli.planning.traces import Request, Trace
from measured_plan.calibrate import ask, probe

# Requests that may wait for an answer at a time; more would mean that the servers are far behind.
MOST_WAITING = 64
FAR_APART_S = 1000.0


class Answered(NamedTuple):
    """What one request found, and seconds from when it was due to its first token."""

    device_tokens: int
    loaded_tokens: int
    ttft_s: float
    sent_late_s: float


def prompt_of(request: Request, unit_tokens: int, number: int) -> list[int]:
    """Tokens of a prompt: those of a unit depend on its name, the rest on the request's number."""
    tokens: list[int] = []
    for unit in request.units:
        tokens += _random_tokens(f"unit {unit}", unit_tokens)
    return tokens + _random_tokens(f"rest {number}", request.prompt_tokens - len(tokens))


def _random_tokens(seed: str, count: int) -> list[int]:
    source = random.Random(seed)
    return [source.randint(FIRST_TOKEN, LAST_TOKEN) for _ in range(count)]


def at_pace(trace: Trace, gap_s: float, seed: int) -> Trace:
    """The same requests in the same order, at random times: a Poisson process of that mean gap."""
    draw, now_s = random.Random(seed), 0.0
    moved = []
    for request in trace.requests:
        moved.append(request._replace(arrival_s=now_s))
        now_s += draw.expovariate(1 / gap_s)
    return replace(trace, requests=moved)


def far_apart(trace: Trace) -> Trace:
    """The same requests, each long after the one before."""
    moved = [r._replace(arrival_s=FAR_APART_S * n) for n, r in enumerate(trace.requests)]
    return replace(trace, requests=moved)


def written(trace: Trace) -> str:
    """The trace as a file for `plan --trace`, a block a unit."""
    lines = [
        {
            "timestamp": 1e3 * request.arrival_s,
            "input_length": request.prompt_tokens,
            "output_length": 1,
            "hash_ids": request.units,
        }
        for request in trace.requests
    ]
    return "".join(json.dumps(line) + "\n" for line in lines)


def open_loop(trace: Trace, servers: Sequence[SGLangClient]) -> list[Answered]:
    """Send each request when it is due, to the servers in turn, whether others wait or not."""
    prompts = [prompt_of(r, trace.unit_tokens, i) for i, r in enumerate(trace.requests)]
    begin_s = time.perf_counter() + 0.5

    def send(number: int) -> Answered:
        due_s = begin_s + trace.requests[number].arrival_s
        late_s = time.perf_counter() - due_s
        got = probe("replay", ask(servers[number % len(servers)], prompts[number]))
        return Answered(got.device_tokens, got.loaded_tokens, got.ttft_s + late_s, late_s)

    with ThreadPoolExecutor(MOST_WAITING) as pool:
        answers = []
        for number, request in enumerate(trace.requests):
            time.sleep(max(0.0, begin_s + request.arrival_s - time.perf_counter()))
            answers.append(pool.submit(send, number))
        return [answer.result() for answer in answers]


def one_by_one(
    trace: Trace, servers: Sequence[SGLangClient], settle: Callable[[], None]
) -> list[Answered]:
    """Each request when the one before has been answered and stored: hits without any race."""
    found = []
    for number, request in enumerate(trace.requests):
        prompt = prompt_of(request, trace.unit_tokens, number)
        got = probe("replay", ask(servers[number % len(servers)], prompt))
        settle()
        found.append(Answered(got.device_tokens, got.loaded_tokens, got.ttft_s, 0.0))
    return found


def median(rounds: Sequence[Sequence[Answered]]) -> list[Answered]:
    """Of each request and each of its figures, over rounds of the same trace."""
    return [
        Answered(
            *(int(statistics.median(a[field] for a in one)) for field in (0, 1)),
            *(statistics.median(a[field] for a in one) for field in (2, 3)),
        )
        for one in zip(*rounds, strict=True)
    ]
