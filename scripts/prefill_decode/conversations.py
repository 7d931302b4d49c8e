# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Conversations of several turns: each prompt is all that was said before, plus a new question.

Owns the prompts, the figures of a turn and the verdict. Bring-up is nodes', looks are report's.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any

from sglang_cpu.client import SGLangClient
from two_instances.run import FIRST_TOKEN, LAST_TOKEN

MIN_GENERATED_SHARE = 0.9


@dataclass(frozen=True)
class Turn:
    """One request of a conversation. Tokens by tier are of the prompt, as prefill reports them."""

    node: str
    conversation: int
    number: int
    prompt: tuple[int, ...]
    output_ids: tuple[int, ...]
    ttft_s: float
    total_s: float
    device_tokens: int
    pool_tokens: int
    gaps_s: tuple[float, ...] = field(repr=False)

    @property
    def computed_tokens(self) -> int:
        """Prompt tokens that no tier had."""
        return len(self.prompt) - self.device_tokens - self.pool_tokens


@dataclass
class Result:
    """All turns, and what was wrong with them."""

    turns: list[Turn] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def of(self, node: str, number: int | None = None) -> list[Turn]:
        return [t for t in self.turns if t.node == node and number in (None, t.number)]

    def median_ttft_s(self, node: str, number: int) -> float:
        return median(turn.ttft_s for turn in self.of(node, number))

    def gap_ms(self, node: str, percent: float) -> float:
        """That percentile of the times between parts of all answers (a part is a token, mostly)."""
        gaps_s = sorted(gap for turn in self.of(node) for gap in turn.gaps_s)
        return gaps_s[min(len(gaps_s) - 1, int(len(gaps_s) * percent / 100))] * 1e3

    def numbers(self) -> list[int]:
        return sorted({turn.number for turn in self.turns})

    def as_dict(self) -> dict[str, Any]:
        return {
            "ok": not self.problems,
            "problems": self.problems,
            "facts": self.facts,
            "turns": [asdict(turn) for turn in self.turns],
        }


class Conversation:
    """One client's turns on one node.

    Args:
        node: whose router is asked; conversations of different nodes share no token.
        seed: decides what the client says.
    """

    def __init__(self, node: str, number: int, seed: str) -> None:
        self.node = node
        self.number = number
        self._source = random.Random(f"{seed} {node} {number}")
        self._said: list[int] = []
        self._turns = 0

    def ask(self, router: SGLangClient, question_tokens: int, answer_tokens: int) -> Turn:
        """The next turn."""
        words = (self._source.randint(FIRST_TOKEN, LAST_TOKEN) for _ in range(question_tokens))
        prompt = [*self._said, *words]
        times_s: list[float] = []
        got = router.generate(
            prompt,
            answer_tokens,
            on_part=lambda _ids: times_s.append(time.perf_counter()),
            return_cached_tokens_details=True,
        )
        tiers = got.cached_tokens_details
        self._turns += 1
        self._said = [*prompt, *got.output_ids]
        return Turn(
            self.node,
            self.number,
            self._turns,
            tuple(prompt),
            tuple(got.output_ids),
            got.ttft_s if got.ttft_s is not None else got.total_s,
            got.total_s,
            tiers.get("device", 0),
            tiers.get("storage", 0),
            tuple(after - before for before, after in pairwise(times_s)),
        )


def generated_share(turns: Iterable[Turn], answer_tokens: int) -> float:
    """Tokens from the pool in later turns ÷ tokens that the turns before them generated.

    What the client said is on the prefill node already; only answers have to come from the pool.
    """
    later = [turn for turn in turns if turn.number > 1]
    return sum(turn.pool_tokens for turn in later) / (len(later) * answer_tokens)


def judge(
    result: Result,
    reference: SGLangClient,
    linked: str,
    answer_tokens: int,
    tick: Callable[[str], None],
    concurrency: int = 2,
) -> None:
    """Fill `problems`: answers that a server without any cache does not give, answers recomputed.

    Args:
        reference: a whole server that caches nothing; it is asked every prompt again.
        linked: the decode node whose answers must come back from the pool.
    """

    def truth(turn: Turn) -> list[int]:
        return reference.generate(turn.prompt, answer_tokens).output_ids

    with ThreadPoolExecutor(concurrency) as pool:
        for number, (turn, right) in enumerate(
            zip(result.turns, pool.map(truth, result.turns), strict=True), 1
        ):
            if list(turn.output_ids) != right:
                result.problems.append(
                    f"{turn.node}, conversation {turn.conversation}, turn {turn.number}: not the "
                    "answer of a server without a cache"
                )
            if not number % 10:
                tick(f"compared {number}/{len(result.turns)} answers with a server without a cache")
    share = generated_share(result.of(linked), answer_tokens)
    result.facts["generated tokens of the turn before that came from the pool"] = f"{share:.1%}"
    if share < MIN_GENERATED_SHARE:
        result.problems.append(
            f"only {share:.1%} of the generated tokens came from the pool, expected at least "
            f"{MIN_GENERATED_SHARE:.0%}"
        )


def stored_pages(turns: Sequence[Turn], page_size: int) -> int:
    """Pages that the pool holds once everything these turns computed has been stored.

    Of each conversation the last turn counts: it holds those before. The last token has no KV.
    """
    last = {turn.conversation: len(turn.prompt) + len(turn.output_ids) - 1 for turn in turns}
    return sum(tokens // page_size for tokens in last.values())
