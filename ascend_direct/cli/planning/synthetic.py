# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""A made-up trace: conversations of several turns behind a few system prompts, from a seed.

Owns the parameters and the random draws. Conversations begin as a Poisson process; each picks a
system prompt (the k-th most popular with weight 1/k), has a geometric number of turns, and after
each answer its user thinks for an exponential time. Questions are exponential in length too.
"""

from __future__ import annotations

import heapq
import itertools
import random
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from ascend_direct.cli.planning.given import read_object
from ascend_direct.cli.planning.traces import Request, Trace

LONGEST_CONVERSATION_TURNS = 50


class Synthetic(BaseModel):
    """`--synthetic`; lengths and times are means."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    requests: int = Field(20_000, ge=1, le=2_000_000)
    requests_per_s: float = Field(8.0, gt=0, le=1e6)
    system_prompts: int = Field(8, ge=1, le=100_000)
    system_prompt_tokens: int = Field(2_048, ge=0, le=1_000_000)
    turns: float = Field(4.0, ge=1, le=LONGEST_CONVERSATION_TURNS)
    question_tokens: int = Field(1_024, ge=1, le=1_000_000)
    answer_tokens: int = Field(384, ge=0, le=1_000_000)
    think_s: float = Field(60.0, ge=0, le=86_400)
    longest_prompt_tokens: int = Field(32_768, ge=1, le=10_000_000)
    seed: int = 1


def read_synthetic(source: str | None) -> Synthetic:
    """`--synthetic` as JSON or @file.

    Raises:
        ConfigError: not JSON, an unknown name or a bad value.
    """
    return read_object(Synthetic, "--synthetic", source)


def generate(given: Synthetic, page_tokens: int) -> Trace:
    """The trace of these parameters, in units of a page; the same seed gives the same trace."""
    draw = random.Random(given.seed)
    names = itertools.count()
    system_pages = given.system_prompt_tokens // page_tokens
    systems = [tuple(next(names) for _ in range(system_pages)) for _ in range(given.system_prompts)]
    weights = [1 / rank for rank in range(1, given.system_prompts + 1)]
    requests: list[Request] = []
    later_s: list[float] = []  # arrivals after the start of the latest conversation
    start_s, arrived = 0.0, 0
    while arrived < given.requests:
        start_s += draw.expovariate(given.requests_per_s / given.turns)
        (system,) = draw.choices(systems, weights)
        turns = _conversation(given, draw, start_s, list(system), names, page_tokens)
        requests += turns
        for turn in turns:
            heapq.heappush(later_s, turn.arrival_s)
        while later_s and later_s[0] <= start_s:
            heapq.heappop(later_s)
            arrived += 1
    requests.sort(key=lambda request: request.arrival_s)
    return Trace(
        f"synthetic, seed {given.seed}",
        requests[: given.requests],
        page_tokens,
        page_tokens,
        frozenset(itertools.chain.from_iterable(systems)),
    )


def _conversation(
    given: Synthetic,
    draw: random.Random,
    now_s: float,
    history: list[int],
    names: Any,
    page_tokens: int,
) -> list[Request]:
    """Its requests; `history` are the pages of what was said, and grows."""
    turns: list[Request] = []
    tokens = given.system_prompt_tokens
    while len(turns) < LONGEST_CONVERSATION_TURNS:
        question = 1 + int(draw.expovariate(1 / given.question_tokens))
        answer = int(draw.expovariate(1 / given.answer_tokens)) if given.answer_tokens else 0
        prompt = tokens + question
        if prompt > given.longest_prompt_tokens and turns:
            break
        prompt = min(prompt, given.longest_prompt_tokens)
        _grow(history, prompt, names, page_tokens)
        asked = tuple(history[: prompt // page_tokens])
        tokens = prompt + answer
        _grow(history, tokens, names, page_tokens)
        said = tuple(history[len(asked) :])
        turns.append(Request(now_s, prompt, answer, asked, page_tokens, said))
        if draw.random() < 1 / given.turns:
            break
        now_s += draw.expovariate(1 / given.think_s) if given.think_s else 0.0
    return turns


def _grow(history: list[int], tokens: int, names: Any, page_tokens: int) -> None:
    """New pages until these tokens fill no further one."""
    history.extend(next(names) for _ in range(tokens // page_tokens - len(history)))
