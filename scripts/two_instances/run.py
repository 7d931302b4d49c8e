# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Send prompts to A, to A again, to B; compare every answer with a server that caches nothing.

Owns the measurement and the verdict. Bring-up is cluster's, looks are report's.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from sglang_cpu.client import Generation, SGLangClient

from two_instances.cluster import Cluster

FIRST_TOKEN, LAST_TOKEN = 3, 1000
MIN_POOL_SHARE = 0.95
HOST_POOL_LOG = "GB host memory for hierarchical KV cache"


@dataclass(frozen=True)
class Answer:
    """One request's outcome. Tokens by tier are of the prompt."""

    phase: str
    server: str
    prompt: int
    output_ids: list[int]
    prompt_tokens: int
    ttft_s: float
    device_tokens: int
    host_tokens: int
    storage_tokens: int

    @property
    def computed_tokens(self) -> int:
        """Prompt tokens that no tier had."""
        return self.prompt_tokens - self.device_tokens - self.host_tokens - self.storage_tokens


@dataclass
class Result:
    """All answers, and what was wrong with them."""

    answers: list[Answer] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def phase(self, name: str) -> list[Answer]:
        return [answer for answer in self.answers if answer.phase == name]

    def median_ttft_s(self, phase: str) -> float:
        return median(answer.ttft_s for answer in self.phase(phase))

    def phases(self) -> list[str]:
        return list(dict.fromkeys(answer.phase for answer in self.answers))

    def as_dict(self) -> dict[str, Any]:
        return {
            "ok": not self.problems,
            "problems": self.problems,
            "facts": self.facts,
            "ttft_median_s": {name: self.median_ttft_s(name) for name in self.phases()},
            "answers": [asdict(answer) for answer in self.answers],
        }


def make_prompts(count: int, tokens: int, seed: int = 3) -> list[list[int]]:
    """Random prompts that share no prefix."""
    source = random.Random(seed)
    return [[source.randint(FIRST_TOKEN, LAST_TOKEN) for _ in range(tokens)] for _ in range(count)]


def ask(server: SGLangClient, tokens: Sequence[int], output_tokens: int) -> Generation:
    """One greedy request that reports where its prompt came from."""
    return server.generate(tokens, output_tokens, return_cached_tokens_details=True)


class Run:
    """The rounds of a demonstration on a running cluster.

    Args:
        page_size: tokens per page, for how much of a prompt can be cached at all.
        tick: called with a line after each request.
    """

    def __init__(
        self,
        cluster: Cluster,
        prompts: Sequence[Sequence[int]],
        *,
        page_size: int,
        output_tokens: int = 4,
        tick: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._cluster = cluster
        self._prompts = prompts
        self._page_size = page_size
        self._output_tokens = output_tokens
        self._tick = tick
        self.result = Result()

    def send(self, phase: str, server: str, number: int) -> Answer:
        """Send prompt `number` to a server and note the answer."""
        got = ask(self._cluster.servers[server], self._prompts[number], self._output_tokens)
        tiers = got.cached_tokens_details or {}
        answer = Answer(
            phase,
            server,
            number,
            list(got.output_ids),
            got.prompt_tokens,
            got.ttft_s if got.ttft_s is not None else got.total_s,
            tiers.get("device", 0),
            tiers.get("host", 0),
            tiers.get("storage", 0),
        )
        self.result.answers.append(answer)
        self._tick(
            f"{phase:<24} prompt {number + 1}/{len(self._prompts)}"
            f"  TTFT {answer.ttft_s * 1e3:7.0f} ms"
            f"  storage {answer.storage_tokens}  device {answer.device_tokens}"
        )
        return answer

    def warm_up(self) -> None:
        """One unrelated prompt to each server: first requests pay for what later ones do not."""
        names = list(self._cluster.servers)
        strangers = make_prompts(len(names), len(self._prompts[0]), seed=len(self._prompts) + 1000)
        for name, prompt in zip(names, strangers, strict=True):
            ask(self._cluster.servers[name], prompt, self._output_tokens)

    def rounds(self) -> Result:
        """Per prompt: no cache, A cold, A again, B; interleaved so that noise hits all alike."""
        self.warm_up()
        pages_per_prompt = (len(self._prompts[0]) - 1) // self._page_size
        before = self._cluster.pool.wait_stored(2 * pages_per_prompt)
        for number in range(len(self._prompts)):
            self.send("no cache", "no cache", number)
            self.send("A, first time", "A", number)
            expected = before + (number + 1) * pages_per_prompt
            if self._cluster.pool.wait_stored(expected) < expected:
                self._tick("the pool does not hold all pages of this prompt; going on")
            self.send("A again (device hit)", "A", number)
            self.send("B (pool hit)", "B", number)
        return self.result

    def after_restart(self) -> Result:
        """Both servers are started anew; only the pool remembers."""
        self._cluster.restart()
        for number in range(len(self._prompts)):
            self.send("B after restart", "B", number)
            self.send("A after restart", "A", number)
        return self.result

    def judge(self) -> Result:
        """Fill `problems`: wrong tokens, hits that did not come from the pool, a host tier."""
        result = self.result
        truth = {answer.prompt: answer.output_ids for answer in result.phase("no cache")}
        for answer in result.answers:
            if answer.output_ids != truth[answer.prompt]:
                result.problems.append(
                    f"{answer.phase}: prompt {answer.prompt + 1} answered {answer.output_ids}, "
                    f"without a cache {truth[answer.prompt]}"
                )
            if answer.host_tokens:
                result.problems.append(
                    f"{answer.phase}: {answer.host_tokens} tokens from a host tier"
                )
        for phase in result.phases():
            if phase.startswith("B"):
                self._judge_pool_share(phase)
        for name, server in self._cluster.servers.items():
            if HOST_POOL_LOG in server.log_text():
                result.problems.append(f"server {name} allocated a host pool")
        return result

    def _judge_pool_share(self, phase: str) -> None:
        answers = self.result.phase(phase)
        share = sum(a.storage_tokens for a in answers) / sum(a.prompt_tokens for a in answers)
        self.result.facts[f"{phase}: share of prompt tokens from the pool"] = round(share, 4)
        if share < MIN_POOL_SHARE:
            self.result.problems.append(
                f"{phase}: only {share:.1%} of the prompt tokens came from the pool, "
                f"expected at least {MIN_POOL_SHARE:.0%}"
            )
