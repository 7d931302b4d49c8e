# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Clients: a bounded pool of prompts with known answers, a bounded number of requests at a time.

Owns the prompts, what is right, and the tally of what came back. Aborts are `aborts`'; which
servers are up is world's.
"""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from sglang_cpu.client import Generation, RequestError
from sglang_cpu.server import SGLangServer

from .world import World

FIRST_TOKEN, LAST_TOKEN = 3, 1000
LONGEST_ANSWER = 48
ANSWER_TOKENS = (1, 4, 8, 16, LONGEST_ANSWER)
REQUEST_TIMEOUT_S = 150.0


@dataclass(frozen=True)
class PromptPool:
    """Families of prompts that share a prefix, short and long, and their right answers."""

    prompts: list[list[int]]
    answers: list[list[int]]

    @classmethod
    def asked(cls, oracle: SGLangServer, families: int, members: int, seed: int) -> PromptPool:
        """Made from the seed; the answers are those of a server that caches nothing."""
        prompts = make_prompts(families, members, seed)
        truth = oracle.generate_many(prompts, 2, LONGEST_ANSWER, stream=False)
        return cls(prompts, [answer.output_ids for answer in truth])

    def is_right(self, number: int, ids: Sequence[int], tokens: int) -> bool:
        """Whether these are the first `tokens` of the greedy answer."""
        return list(ids) == self.answers[number][:tokens]

    def is_prefix(self, number: int, ids: Sequence[int]) -> bool:
        """The same for an answer that was cut short, however short."""
        return self.is_right(number, ids, len(ids))


def make_prompts(families: int, members: int, seed: int) -> list[list[int]]:
    """`members` prompts per family; every third family is short."""
    dice = random.Random(f"{seed} prompts")

    def tokens(count: int) -> list[int]:
        return [dice.randint(FIRST_TOKEN, LAST_TOKEN) for _ in range(count)]

    prompts = []
    for family in range(families):
        short = family % 3 == 2
        prefix = tokens(dice.randint(100, 200) if short else dice.randint(400, 800))
        for _ in range(members):
            prompts.append(prefix + tokens(dice.randint(8, 40 if short else 500)))
    return prompts


@dataclass
class Tally:
    """What came back. Lists of sentences are violations; counters are facts."""

    wrong: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    ttft_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, **amounts: int) -> None:
        with self.lock:
            self.counts.update(amounts)

    def note_wrong(self, what: str) -> None:
        with self.lock:
            self.wrong.append(what)

    def note_failed(self, what: str) -> None:
        with self.lock:
            self.failed.append(what)

    def note_times(self, ttft_s: float | None, gaps_s: Sequence[float]) -> None:
        with self.lock:
            self.ttft_s += [] if ttft_s is None else [ttft_s]
            self.gaps_s += gaps_s


class Client:
    """Sends single requests and judges the answers."""

    def __init__(self, world: World, prompts: PromptPool, tally: Tally) -> None:
        self.world = world
        self.prompts = prompts
        self.tally = tally
        self._spared: set[str] = set()

    def willing(self) -> list[str]:
        """Servers that may be asked now."""
        return [name for name in self.world.serving() if name not in self._spared]

    @contextmanager
    def spared(self, name: str) -> Iterator[None]:
        """Inside the block this server gets no new requests."""
        self._spared.add(name)
        try:
            yield
        finally:
            self._spared.discard(name)

    def ask(self, name: str, number: int, tokens: int, stream: bool) -> Generation | None:
        """One request that nobody disturbs; None when it failed. The tally knows the outcome."""
        begin_s, parts_s = time.monotonic(), list[float]()
        where = f"{name}, prompt {number}, {tokens} tokens"
        try:
            got = self.world.servers[name].generate(
                self.prompts.prompts[number],
                tokens,
                stream=stream,
                timeout_s=REQUEST_TIMEOUT_S,
                on_part=lambda ids: parts_s.append(time.monotonic()),
                return_cached_tokens_details=True,
            )
        except RequestError as error:
            self._failed(name, begin_s, f"{where}: {error}")
            return None
        if got.aborted:
            self._failed(name, begin_s, f"{where}: aborted by the server: {got.finish_reason}")
            return None
        if not self.prompts.is_right(number, got.output_ids, tokens):
            self.tally.note_wrong(
                f"{where}: {got.output_ids} instead of {self.prompts.answers[number][:tokens]}, "
                f"cached {got.cached_tokens_details}"
            )
        tiers = got.cached_tokens_details
        self.tally.add(
            answered=1,
            prompt_tokens=got.prompt_tokens,
            device_tokens=tiers.get("device", 0),
            pool_tokens=tiers.get("storage", 0),
            answered_from_pool=int(tiers.get("storage", 0) > 0),
        )
        gaps_s = [b - a for a, b in itertools.pairwise(parts_s)]
        self.tally.note_times(got.ttft_s, gaps_s)
        return got

    def _failed(self, name: str, begin_s: float, what: str) -> None:
        if self.world.was_down(name, begin_s, time.monotonic()):
            self.tally.add(lost_with_a_killed_server=1)
        else:
            self.tally.note_failed(what)


class Traffic:
    """Threads that keep asking until told to stop.

    Args:
        clients: requests at a time, over all servers.
    """

    def __init__(self, client: Client, clients: int, seed: int) -> None:
        self._client = client
        self._go = threading.Event()
        self._stop = threading.Event()
        self._busy = threading.Semaphore(clients)
        self._count = clients
        self._threads = [
            threading.Thread(target=self._work, args=(random.Random(f"{seed} client {n}"),))
            for n in range(clients)
        ]

    def start(self) -> None:
        self._go.set()
        for thread in self._threads:
            thread.start()

    def pause(self) -> None:
        """Returns once no request is under way."""
        self._go.clear()
        for _ in range(self._count):
            self._busy.acquire()
        for _ in range(self._count):
            self._busy.release()

    def resume(self) -> None:
        self._go.set()

    def stop(self) -> None:
        """Ends after the requests under way."""
        self._stop.set()
        self._go.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()

    def _work(self, dice: random.Random) -> None:
        prompts = self._client.prompts.prompts
        while not self._stop.is_set():
            self._go.wait()
            with self._busy:
                up = self._client.willing()
                if not self._go.is_set() or self._stop.is_set():
                    continue
                if not up:
                    time.sleep(0.2)
                    continue
                # Squared: some prompts are asked often, all of them sometimes.
                number = int(len(prompts) * dice.random() ** 2)
                tokens, stream = dice.choice(ANSWER_TOKENS), dice.random() < 0.7
                self._client.ask(dice.choice(up), number, tokens, stream)
