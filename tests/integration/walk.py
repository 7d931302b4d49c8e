# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""A seeded random walk over instances that share a pool: requests, faults, flushes, restarts.

Owns the choice of actions. `rng` chooses what the schedulers do and must be seeded alike on all
ranks of an instance; `chaos` chooses what goes wrong in the pool and may differ between ranks. The
instances check bytes themselves; what is checked after each step is the caller's.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable

from sglang.srt.mem_cache.base_prefix_cache import EvictParams

from ascend_direct.store.base import PageStatus
from ascend_direct.transfer.breaker import Breaker

from .audit import drain
from .instance import Instance
from .prompts import prompt
from .served import Phase, Served

WALK_CONFIG = {
    "load_timeout_ms": 40,
    "lookup_timeout_ms": 200,
    "store_timeout_ms": 80,
    "lookup_memo_ms": 30,
    "belief_ttl_ms": 2_000,
}
MOST_REQUESTS = 4
FAULTS = ("late get", "hung put", "get", "put", "lost", "exists", "slow")
FAULT_WEIGHTS = (4, 2, 2, 1, 1, 1, 1)
ADAPTERS = (None, None, None, "adapter-1", "adapter-2")


class Walk:
    """Takes one random step at a time.

    Args:
        instances: all share `instances[0].store.pool`.
    """

    def __init__(self, instances: list[Instance], rng: random.Random, chaos: random.Random) -> None:
        self.instances = instances
        self.done: Counter[str] = Counter()
        self._rng = rng
        self._chaos = chaos
        for instance in instances:  # seconds of pause would leave nothing to test
            instance.controller.engine._breaker = Breaker(5, 0.01, 0.02)
            instance.controller.engine._load_breaker = Breaker(5, 0.01, 0.02)
        self._actions: dict[Callable[[Instance], bool], int] = {
            self._submit: 24,
            self._prefill: 36,
            self._decode: 16,
            self._finish: 14,
            self._retract: 2,
            self._abort: 3,
            self._evict: 14,
            self._flush: 1,
            self._fault: 6,
            self._heal: 8,
            self._lose_pages: 2,
            self._rounds: 4,
        }

    def step(self) -> str:
        """One action that was possible; returns its name."""
        while True:
            instance = self._rng.choice(self.instances)
            (action,) = self._rng.choices(list(self._actions), list(self._actions.values()))
            if action(instance):
                name = action.__name__.strip("_")
                self.done[name] += 1
                return name

    def finish(self) -> None:
        """Heal the pool and bring every request to its end."""
        for instance in self.instances:
            self._heal(instance)
            while instance.requests:
                for served in list(instance.requests):
                    self._advance(instance, served)
            drain(instance)

    # ---- requests ----------------------------------------------------------------------------

    def _submit(self, instance: Instance) -> bool:
        if len(instance.requests) >= MOST_REQUESTS:
            return False
        rng = self._rng
        shared = prompt(256, seed=rng.randrange(4))[: rng.choice((0, 60, 128, 200, 256))]
        own = prompt(rng.randrange(1, 120), seed=rng.randrange(4, 400))
        instance.submit(shared + own, new_tokens=rng.randrange(1, 30), lora=rng.choice(ADAPTERS))
        return True

    def _pick(self, instance: Instance, *phases: Phase) -> Served | None:
        found = [s for s in instance.requests if s.phase in phases]
        return self._rng.choice(found) if found else None

    def _prefill(self, instance: Instance) -> bool:
        served = self._pick(instance, Phase.CHUNKED) or self._pick(instance, Phase.WAITING)
        if served is None:
            return False
        chunk = self._rng.choice((None, None, 16, 48, 100))
        served_now = instance.prefill(served, chunk, abort=self._rng.random() < 0.03)
        if not served_now and served.phase is Phase.CHUNKED:
            self._make_room(instance)
        return True

    def _decode(self, instance: Instance) -> bool:
        served = self._pick(instance, Phase.RUNNING)
        if served is None:
            return False
        if instance.has_room(instance.page_size):
            instance.decode(served)
        else:
            instance.retract(served)
        return True

    def _finish(self, instance: Instance) -> bool:
        served = self._pick(instance, Phase.RUNNING)
        if served is None:
            return False
        while served.phase is Phase.RUNNING:
            if not instance.has_room(instance.page_size):
                instance.retract(served)
                break
            instance.decode(served)
        return True

    def _advance(self, instance: Instance, served: Served) -> None:
        if served.phase is Phase.RUNNING:
            if instance.has_room(instance.page_size):
                instance.decode(served)
            else:
                instance.retract(served)
            return
        if served.phase is Phase.WAITING and self._pick(instance, Phase.CHUNKED):
            return  # SGLang chunks one request at a time
        if not instance.prefill(served):
            self._make_room(instance)

    def _make_room(self, instance: Instance) -> None:
        """Nothing can go on while others hold the memory."""
        running = self._pick(instance, Phase.RUNNING)
        if running is not None:
            instance.retract(running)
        elif chunked := self._pick(instance, Phase.CHUNKED):
            instance.abort(chunked)
        else:
            instance.round()

    def _retract(self, instance: Instance) -> bool:
        served = self._pick(instance, Phase.RUNNING)
        if served is None:
            return False
        instance.retract(served)
        return True

    def _abort(self, instance: Instance) -> bool:
        served = self._pick(instance, *Phase)
        if served is None:
            return False
        if served.phase is Phase.RUNNING and not instance.has_room(instance.page_size):
            return False
        instance.abort(served)
        return True

    def _rounds(self, instance: Instance) -> bool:
        for _ in range(40):  # past a look for late stores
            instance.round()
        return True

    # ---- the device cache --------------------------------------------------------------------

    def _evict(self, instance: Instance) -> bool:
        wanted = self._rng.choice((100, instance.allocator.size))
        instance.tree.evict(EvictParams(num_tokens=wanted))
        return True

    def _flush(self, instance: Instance) -> bool:
        for served in list(instance.requests):
            if served.phase is Phase.RUNNING:
                instance.retract(served)
            instance.abort(served)
        soon = threading.Timer(0.005, self._release, [instance])
        soon.start()
        instance.flush()
        soon.join()
        return True

    # ---- the pool ----------------------------------------------------------------------------

    def _fault(self, instance: Instance) -> bool:
        chaos, faults = self._chaos, instance.store.faults
        which = chaos.choices(FAULTS, FAULT_WEIGHTS)[0]
        keys = instance.store.pool.keys()
        some = chaos.sample(keys, min(len(keys), 5))
        if which in ("late get", "hung put"):
            fault = faults[which[-3:]]
            if fault._gate is None:  # a second hold would leave who waits for the first behind
                fault.hold()
        elif which == "lost":
            faults["get"].before = lambda asked: instance.store.pool.drop(asked[-1])
        elif which == "exists":
            faults["exists"].fails_after_keys = 0
        elif which == "slow":
            faults["get"].delay_ms = 3
        else:
            faults[which].statuses |= dict.fromkeys(some, PageStatus.UNAVAILABLE)
            faults[which].fails_after_keys = chaos.choice((None, 3))
        return True

    def _heal(self, instance: Instance) -> bool:
        for fault in instance.store.faults.values():
            fault.statuses.clear()
            fault.fails_after_keys = fault.before = None
            fault.delay_ms = 0.0
        self._release(instance)
        return True

    @staticmethod
    def _release(instance: Instance) -> None:
        for fault in instance.store.faults.values():
            fault.release()

    def _lose_pages(self, instance: Instance) -> bool:
        pool = instance.store.pool
        keys = pool.keys()
        if self._chaos.random() < 0.2:
            pool.clear()
        else:
            pool.drop(*self._chaos.sample(keys, len(keys) // 4))
        return True
