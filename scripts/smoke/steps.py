# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""The steps of the smoke test, each on what the ones before it have left running.

Owns what is done and judged; where it runs is `place`'s, the verdict and the report __main__'s. A
step raises StepFailed, or returns the facts it has found.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from accuracy.journal import Journal
from accuracy.repeat import Repeat
from accuracy.sending import Sender
from sglang_cpu.server import SGLangServer
from two_instances.cluster import MemcachePool, Progress
from two_instances.run import ask, make_prompts

from smoke.place import Place

OUTPUT_TOKENS = 4
MIN_POOL_SHARE = 0.9
STORED_TIMEOUT_S = 60.0
PATIENCE_S, BACK_TIMEOUT_S = 120.0, 240.0  # before and after the servers are started again
# The pool has just been down: a few loads may still be late, and are recomputed as they should be.
MAX_RECOMPUTED_SHARE, MAX_RECOMPUTED = 0.02, 3
DOCTOR_TIMEOUT_S = 120.0

Facts = dict[str, Any]


class StepFailed(RuntimeError):
    """What a step found wrong."""


def doctor(place: Place) -> Facts:
    """What `ascend-direct doctor` says about this machine."""
    command = [sys.executable, "-m", "ascend_direct.cli.main", "doctor", "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=DOCTOR_TIMEOUT_S
    )
    facts = {"exit_code": done.returncode, "output": done.stdout[-4000:]}
    if done.returncode and not place.emulated:  # a CPU has no NPU to find: nothing to judge
        raise StepFailed(f"doctor ended with {done.returncode}: {done.stdout[-1000:]}")
    return facts


class Family:
    """The steps of one model family on one pool, in order.

    Args:
        prompts: how many; each has `prompt_tokens` random tokens.
        folder: for logs and answers; new for each run.
    """

    def __init__(
        self,
        place: Place,
        model: Path,
        folder: Path,
        *,
        prompts: int,
        prompt_tokens: int,
        page_size: int,
        say: Progress,
    ) -> None:
        self._place, self._model, self._folder, self._say = place, model, folder, say
        self._count, self._tokens, self._page_size = prompts, prompt_tokens, page_size
        self._undo = ExitStack()
        self._seed = time.time_ns()
        self._pool: MemcachePool = place.pool()
        self._servers: list[SGLangServer] = []
        self.steps = (self.pool, self.servers, self.repeat, self.fault, self.bench)

    def close(self) -> None:
        """End everything that was started."""
        self._undo.close()

    def pool(self) -> Facts:
        """MetaService and a member that gives DRAM."""
        self._undo.callback(self._pool.stop)
        self._pool.start()
        return {"pool": self._pool.name, "meta_service_url": self._pool.meta.meta_service_url}

    def servers(self) -> Facts:
        """Two servers on the pool."""
        for number in (0, 1):
            log = self._folder / f"{'AB'[number]}.log"
            server = self._place.server(
                self._pool, self._model, number, self._page_size, log, self._say
            )
            self._undo.callback(server.stop)
            self._servers.append(server)
            server.start()
        for server in self._servers:
            server.wait_ready()
        return {server.name: server.command for server in self._servers}

    def repeat(self) -> Facts:
        """New prompts to A, which computes them all, then to B, which loads them all."""
        a, b = self._servers
        prompts = self._new_prompts(self._count)
        journal = Journal(self._folder / "repeat.jsonl", {"seed": self._seed})
        test = Repeat(prompts, OUTPUT_TOKENS, journal, Sender(None, concurrency=1))
        before = self._pool.stored_pages()
        test.send("A", a)
        self._wait_stored(before, len(prompts))
        test.send("B", b)
        report = test.report("A")
        cold, hits = report.tokens_by_tier["A"], report.tokens_by_tier["B"]
        if report.problems:
            raise StepFailed("; ".join(report.problems[:5]))
        if cold["device"] or cold["storage"]:
            raise StepFailed(f"A was to compute everything: {cold}")
        if hits["storage"] < MIN_POOL_SHARE * hits["prompt"]:
            raise StepFailed(f"B was to load from the pool: {hits}")
        return {"identical": report.identical, "tokens_by_tier": report.tokens_by_tier}

    def fault(self) -> Facts:
        """The whole pool dies: answers stay right. It comes back: B loads from it again, if need be
        after the servers were started again, too."""
        a, b = self._servers
        (prompt,) = self._new_prompts(1)
        right = ask(a, prompt, OUTPUT_TOKENS).output_ids
        self._kill_pool()
        without = ask(b, prompt, OUTPUT_TOKENS)
        if without.output_ids != right:
            raise StepFailed(f"without a pool B answered {without.output_ids}, A {right}")
        self._revive_pool()
        back_s = self._back_after_s(PATIENCE_S)
        started_over = back_s is None
        if started_over:  # MemCache 1.3 may let nobody in: docs/operations.md says what to do then
            for server in self._servers:
                server.stop()
            self._kill_pool()
            self._revive_pool()
            self._pool.meta.wait_linked(len(self._pool.members), BACK_TIMEOUT_S)
            for server in self._servers:
                server.start()
            for server in self._servers:
                server.wait_ready()
            back_s = self._back_after_s(BACK_TIMEOUT_S)
        if back_s is None:
            raise StepFailed("the pool and both servers were started again, but B loads nothing")
        return {"back_after_s": back_s, "servers_started_again": started_over}

    def _kill_pool(self) -> None:
        self._pool.meta.kill()
        for member in self._pool.members:
            member.kill()
            member.wait()

    def _revive_pool(self) -> None:
        self._pool.meta.start_again()
        for number in range(len(self._pool.members)):
            self._pool.replace_member(number)

    def _back_after_s(self, timeout_s: float) -> float | None:
        """Seconds until B loads what A stores, or None; no answer may be wrong meanwhile."""
        a, b = self._servers
        begin_s = time.monotonic()
        while (waited_s := time.monotonic() - begin_s) < timeout_s:
            (prompt,) = self._new_prompts(1)
            right = ask(a, prompt, OUTPUT_TOKENS).output_ids
            time.sleep(2.0)  # A's write-back; if it took longer, the next round sees it
            got = ask(b, prompt, OUTPUT_TOKENS)
            if got.output_ids != right:
                raise StepFailed(f"after the pool's return B answered {got.output_ids}, A {right}")
            if got.cached_tokens_details.get("storage", 0):
                return round(waited_s, 1)
        return None

    def bench(self) -> Facts:
        """Time to first token: computed by A against loaded by B, prompt by prompt."""
        computed_s: list[float] = []
        loaded_s: list[float] = []
        recomputed = 0
        while len(loaded_s) < self._count:
            times_s = self._compute_and_load()
            if times_s is not None:
                computed_s.append(times_s[0])
                loaded_s.append(times_s[1])
                continue
            recomputed += 1
            if recomputed > MAX_RECOMPUTED_SHARE * self._count + MAX_RECOMPUTED:
                raise StepFailed(f"{recomputed} stored prompts were recomputed, not loaded")
        change = median(loaded_s) / median(computed_s) - 1
        if change >= 0 and not self._place.emulated:  # a tiny model on a CPU says nothing of speed
            raise StepFailed(f"loading is not faster than computing: TTFT {change:+.1%}")
        return {
            "ttft_computed_s": computed_s,
            "ttft_loaded_s": loaded_s,
            "ttft_change": round(change, 4),
            "recomputed": recomputed,
            "judged": not self._place.emulated,
        }

    def _compute_and_load(self) -> tuple[float, float] | None:
        """TTFT of a new prompt on A and then on B, seconds; None if B could not load all of it."""
        a, b = self._servers
        (prompt,) = self._new_prompts(1)
        before = self._pool.stored_pages()
        cold = ask(a, prompt, OUTPUT_TOKENS)
        self._wait_stored(before, 1)
        hit = ask(b, prompt, OUTPUT_TOKENS)
        if hit.cached_tokens_details.get("storage", 0) < MIN_POOL_SHARE * len(prompt):
            return None
        return cold.ttft_s or 0.0, hit.ttft_s or 0.0

    def _new_prompts(self, count: int) -> list[list[int]]:
        self._seed += 1
        return make_prompts(count, self._tokens, seed=self._seed)

    def _wait_stored(self, before: int, prompts: int) -> None:
        pages = before + prompts * ((self._tokens - 1) // self._page_size)
        deadline_s = time.monotonic() + STORED_TIMEOUT_S
        while (held := self._pool.stored_pages()) < pages:
            if time.monotonic() > deadline_s:
                raise StepFailed(f"the pool holds {held} pages, expected {pages}")
            time.sleep(0.1)


def versions() -> Facts:
    """Of this package and those it works with."""
    command = [sys.executable, "-m", "ascend_direct.cli.main", "version", "--json"]
    answer: Facts = json.loads(subprocess.check_output(command, text=True))
    return answer
