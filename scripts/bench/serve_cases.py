# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""What scripts/bench/serve asks of one system in one turn, and what it notes.

A turn has prompts of its own, the same for every system in the same round, so that answers can be
compared. Owns prompts, order of requests and samples. Servers are serve_systems', figures
serve_report's.
"""

from __future__ import annotations

import hashlib
import time
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sglang_cpu.client import Generation, SGLangClient
from two_instances.run import make_prompts

from bench.serve_systems import Running, System

SETTLE_TIMEOUT_S = 20.0
SETTLE_QUIET_S = 0.3
MIN_HIT_SHARE = 0.95
VERIFICATION = -1
TRACE_TURNS = 4
TRACE_OUTPUT_TOKENS = 16
# Less than a page of 128 tokens: nothing of it is cached.
WAKING_PROMPT = list(range(3, 67))

Prompt = list[int]


class BenchmarkError(RuntimeError):
    """A system did not do what it is compared for: its figures would mean nothing."""


@dataclass(frozen=True)
class Turn:
    """One system's turn in one round: all requests of one case, `concurrency` at a time.

    Round -1 is the verification; what it takes is not reported.
    """

    model: str
    system: str
    round: int
    case: str
    concurrency: int

    @property
    def key(self) -> tuple[str, str, int, str, int]:
        return (self.model, self.system, self.round, self.case, self.concurrency)


@dataclass(frozen=True)
class Sample:
    """One group of requests that were sent together; a line of the result file.

    Attributes:
        case: "single" (concurrency 1), "burst" (more) or "trace" (a conversation).
        where: "within": the server that computed the prefix is asked; "cross": another one.
        reuse: percent of the prompt that was computed before; for a trace the turn's number.
        ttft_s: per request.
        cached: tokens by tier, summed over the requests.
        prompt_tokens: summed over the requests.
        prompts: digest of each prompt.
        outputs: ids answered, per request.
    """

    model: str
    system: str
    round: int
    case: str
    concurrency: int
    where: str
    reuse: int
    ttft_s: list[float]
    cached: dict[str, int]
    prompt_tokens: int
    prompts: list[str]
    outputs: list[list[int]]

    @property
    def turn(self) -> Turn:
        """The turn that it was taken in."""
        return Turn(self.model, self.system, self.round, self.case, self.concurrency)

    def line(self) -> dict[str, Any]:
        return {"kind": "sample", **asdict(self)}


@dataclass(frozen=True)
class Workload:
    """Sizes of the prompts.

    Attributes:
        prompt_tokens: of a whole prompt.
        prompts: how many are sent one after another in a turn of case "single".
        reuse: percents to measure.
        output_tokens: of an answer.
        page_size: tokens per page, the unit in which anything is reused.
    """

    prompt_tokens: int
    prompts: int
    reuse: Sequence[int]
    output_tokens: int
    page_size: int

    def prefix_tokens(self, reuse: int) -> int:
        return self.prompt_tokens * reuse // 100

    def reusable_tokens(self, reuse: int) -> int:
        """Whole pages that a cache can have, when at least one token must be computed."""
        most = min(self.prefix_tokens(reuse), self.prompt_tokens - 1)
        return most // self.page_size * self.page_size


def run_turn(turn: Turn, running: Running, work: Workload) -> list[Sample]:
    """Send everything; afterwards the servers' device caches are as empty as before."""
    if running.pool is not None:
        running.pool.clear()
    driver = _Driver(turn, running, work)
    samples = driver.trace() if turn.case == "trace" else driver.reuse()
    for server in running.servers:
        server.flush()
    return samples


class _Driver:
    def __init__(self, turn: Turn, running: Running, work: Workload) -> None:
        self._turn = turn
        self._running = running
        self._work = work
        system = running.system
        self._places: tuple[str, ...] = ("cross", "within") if system.shares else ("within",)
        if not system.reuses:
            # Cold prompts are all alike, so a few are enough; in the verification they are truth.
            self._places = ("cross", "within") if turn.round == VERIFICATION else ()

    def _prompts(self, stream: int, tokens: int) -> list[Prompt]:
        """Prompts that only this round and case have; alike for every system and model."""
        turn = self._turn
        seed = ((turn.round + 2) * 100 + turn.concurrency) * 100_000 + stream
        return make_prompts(turn.concurrency, tokens, seed=seed)

    def reuse(self) -> list[Sample]:
        """Each first computation of a whole prompt is a sample of 0 % reuse."""
        groups = self._work.prompts if self._turn.concurrency == 1 else 1
        later = [reuse for reuse in self._work.reuse if reuse] or [0]
        pairs = [(number, reuse) for number in range(groups) for reuse in later]
        return [sample for number, reuse in pairs for sample in self._group(number, reuse)]

    def _group(self, number: int, reuse: int) -> Iterator[Sample]:
        """Cold on the first server, then the prefix with other ends: elsewhere, and there again."""
        stream = number * 1000 + reuse
        whole = self._prompts(stream, self._work.prompt_tokens)
        before = self._running.stored_keys()
        yield self._send("within", 0, whole)
        if not reuse:
            return
        self._settle(before, len(whole), self._work.prompt_tokens)
        prefix = self._work.prefix_tokens(reuse)
        for offset, place in enumerate(("cross", "within"), 1):
            if place not in self._places:
                continue
            ends = self._prompts(stream + offset * 101, self._work.prompt_tokens - prefix)
            again = [w[:prefix] + e for w, e in zip(whole, ends, strict=True)]
            before = self._running.stored_keys()
            yield self._send(place, reuse, again)
            # What was just computed is written back, not while we measure.
            reused = self._work.reusable_tokens(reuse)
            self._settle(before, len(whole), self._work.prompt_tokens - reused)

    def trace(self) -> list[Sample]:
        """A conversation that grows to a whole prompt; "cross": its turns alternate over servers.

        A one-server system has it on that server.
        """
        samples: list[Sample] = []
        step = self._work.prompt_tokens // TRACE_TURNS
        for where in self._places or ("within",):
            stream = 7 if where == "within" else 8
            (words,) = self._prompts(stream, step * TRACE_TURNS)
            history: Prompt = []
            for number in range(TRACE_TURNS):
                history = history + words[number * step : (number + 1) * step]
                place = "cross" if where == "cross" and number % 2 else "within"
                before = self._running.stored_keys()
                sample = self._send(place, number + 1, [history], TRACE_OUTPUT_TOKENS, label=where)
                samples.append(sample)
                history = history + sample.outputs[0]
                self._settle(before, 1, step)
        return samples

    def _send(
        self,
        where: str,
        reuse: int,
        prompts: list[Prompt],
        output_tokens: int | None = None,
        label: str | None = None,
    ) -> Sample:
        server: SGLangClient = self._running.server(where)
        # Else "cross" would be asked of a server that has been idle, and "within" of one that was
        # busy a moment ago.
        server.generate(WAKING_PROMPT, 1)
        answers = server.generate_many(
            prompts,
            concurrency=len(prompts),
            max_new_tokens=output_tokens or self._work.output_tokens,
            return_cached_tokens_details=True,
        )
        return Sample(
            **asdict(self._turn),
            where=label or where,
            reuse=reuse,
            ttft_s=[a.total_s if a.ttft_s is None else a.ttft_s for a in answers],
            cached=_by_tier(answers),
            prompt_tokens=sum(a.prompt_tokens for a in answers),
            prompts=[digest(prompt) for prompt in prompts],
            outputs=[list(a.output_ids) for a in answers],
        )

    def _settle(self, before: int, prompts: int, tokens: int) -> None:
        """Wait until what was computed is in the pool: its count has grown and stands still.

        Args:
            before: objects in the pool before the request.
            tokens: of each prompt, that were computed.
        """
        if not self._running.system.shares:
            return
        objects = 2 if self._running.system.splits_kv and self._turn.model == "gqa" else 1
        pages = max(tokens // self._work.page_size - 1, 0)
        wanted = before + prompts * pages * objects
        held, since = -1, time.monotonic()
        deadline_s = since + SETTLE_TIMEOUT_S
        while time.monotonic() < deadline_s:
            now_held = self._running.stored_keys()
            if now_held != held:
                held, since = now_held, time.monotonic()
            elif held >= wanted and time.monotonic() - since > SETTLE_QUIET_S:
                return
            time.sleep(0.05)
        raise BenchmarkError(
            f"{self._running.name}: the pool has {held} objects {SETTLE_TIMEOUT_S:g} s after a "
            f"request, at least {wanted} were expected; see the server's log"
        )


def _by_tier(answers: Sequence[Generation]) -> dict[str, int]:
    tiers: dict[str, int] = {}
    for answer in answers:
        # A server without any tier beside the device gives no details.
        details = answer.cached_tokens_details or {"device": answer.cached_tokens}
        for tier, tokens in details.items():
            tiers[tier] = tiers.get(tier, 0) + tokens
    return {tier: tokens for tier, tokens in tiers.items() if tokens}


# ---- verification, before a time counts -------------------------------------------------------


def digest(prompt: Prompt) -> str:
    """The same for the same prompt, in every run."""
    return hashlib.sha256(array("q", prompt).tobytes()).hexdigest()[:16]


class Truth:
    """The first answer to each prompt; every later one must equal it."""

    def __init__(self) -> None:
        self._first: dict[tuple[str, str], tuple[str, list[int]]] = {}

    def problems(self, sample: Sample) -> list[str]:
        """What is wrong with a sample's answers; remembers those that are new."""
        found = []
        for prompt, ids in zip(sample.prompts, sample.outputs, strict=True):
            owner, right = self._first.setdefault((sample.model, prompt), (sample.system, ids))
            if ids != right:
                found.append(
                    f"{sample.model}, {sample.system}, {sample.case}, {sample.where}, "
                    f"{sample.reuse} %: answered {ids}, {owner} answered {right}"
                )
        return found


def missed(sample: Sample, system: System, work: Workload) -> str | None:
    """Why a sample is not what it says: a cache that should have had the prefix did not."""
    if sample.case == "trace":
        return None
    expected = work.reusable_tokens(sample.reuse) * sample.concurrency if system.reuses else 0
    tiers = ("device",) if sample.where == "within" else ("host", "storage")
    got = sum(sample.cached.get(tier, 0) for tier in tiers)
    others = sum(sample.cached.values()) - got
    if expected * MIN_HIT_SHARE <= got <= expected and not others:
        return None
    return (
        f"{sample.system}, {sample.case}, {sample.where} {sample.reuse} %: tokens from caches "
        f"{sample.cached}, expected {expected} from {' or '.join(tiers)}"
    )
