# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""A fleet that answers a trace: instances with a device cache each, and one pool.

Owns the order of events and what a request finds where. An instance prefills batch after batch,
first come, first served; a load is read while its batch is built, as with `load_mode: sync`; what
was computed can be found on the device at once and in the pool after a store. Decoding takes no
time of an instance here, and its own memory none of the device cache.
"""

from __future__ import annotations

import heapq
import itertools
import math
from array import array
from collections import deque
from dataclasses import dataclass, field

from ascend_direct.cli.planning.costs import Costs
from ascend_direct.cli.planning.lru import Lru
from ascend_direct.cli.planning.routing import router
from ascend_direct.cli.planning.traces import Request, Trace

# Traffic is also told of the busiest of so many equal pieces of the time.
SLICES = 100


@dataclass(frozen=True)
class Fleet:
    """What answers.

    Attributes:
        device_tokens: KV that an instance holds (SGLang's max_total_num_tokens).
        pool_tokens: KV that the pool holds; 0 without a pool.
        evict_above, evict_to: shares of the pool, as `ascend-direct meta` has them.
        min_load_tokens: shorter pool hits are computed.
        batch_tokens: a prefill batch computes about this many (SGLang's chunked-prefill-size).
    """

    instances: int
    device_tokens: int
    pool_tokens: int = 0
    evict_above: float = 0.9
    evict_to: float = 0.8
    min_load_tokens: int = 128
    batch_tokens: int = 8192
    policy: str = "round-robin"

    def pool(self) -> Lru:
        return Lru(self.pool_tokens * self.evict_above, self.pool_tokens * self.evict_to)


@dataclass
class Outcome:
    """What came of it; arrays have one entry per request, in order of arrival."""

    ttft_s: array[float]
    device_tokens: array[int]
    loaded_tokens: array[int]
    stored_tokens: int = 0
    busy_s: float = 0.0
    end_s: float = 0.0
    pool_peak_tokens: int = 0
    pool_evicted_tokens: int = 0
    # (seconds, tokens) of each load and each store.
    loads: list[tuple[float, int]] = field(default_factory=list)
    stores: list[tuple[float, int]] = field(default_factory=list)


@dataclass(slots=True)
class _Start:
    """A request of the batch that is being built."""

    number: int
    request: Request
    on_device: int
    in_pool: int
    device_tokens: int
    loaded_tokens: int

    @property
    def computed_tokens(self) -> int:
        return self.request.prompt_tokens - self.device_tokens - self.loaded_tokens


class Simulation:
    """One run over a trace."""

    def __init__(self, trace: Trace, fleet: Fleet, costs: Costs) -> None:
        self._trace, self._fleet, self._costs = trace, fleet, costs
        self._unit_tokens, self._page_tokens = trace.unit_tokens, trace.page_tokens
        count = len(trace.requests)
        zeros = bytes(8 * count)
        self.outcome = Outcome(array("d", zeros), array("q", zeros), array("q", zeros))
        self.pool = fleet.pool()
        self.devices = [Lru(fleet.device_tokens) for _ in range(fleet.instances)]
        self._queues: list[deque[int]] = [deque() for _ in range(fleet.instances)]
        self._busy = [False] * fleet.instances
        self._waiting_tokens = [0] * fleet.instances
        self._router = router(fleet.policy)
        # (when, order, what, instance, requests): what happens after what has been handled.
        self._events: list[tuple[float, int, int, int, list[int]]] = []
        self._order = itertools.count()
        self._wire_free_s = 0.0

    def run(self) -> Outcome:
        """Answer every request."""
        for number, request in enumerate(self._trace.requests):
            self._advance(request.arrival_s)
            instance = self._router.choose(request, self._waiting_tokens)
            self._queues[instance].append(number)
            self._waiting_tokens[instance] += request.prompt_tokens
            if not self._busy[instance]:
                self._start(instance, request.arrival_s)
        self._advance(math.inf)
        outcome, pool = self.outcome, self.pool
        outcome.pool_peak_tokens, outcome.pool_evicted_tokens = (
            pool.peak_tokens,
            pool.evicted_tokens,
        )
        return outcome

    # ---- events ----------------------------------------------------------------------------

    _DONE, _STORED, _ANSWERED = 0, 1, 2

    def _later(self, when_s: float, what: int, instance: int, numbers: list[int]) -> None:
        heapq.heappush(self._events, (when_s, next(self._order), what, instance, numbers))

    def _advance(self, until_s: float) -> None:
        events = self._events
        while events and events[0][0] <= until_s:
            now_s, _, what, instance, numbers = heapq.heappop(events)
            if what == self._DONE:
                self._finish(instance, numbers, now_s)
            elif what == self._STORED:
                self._keep(numbers, now_s)
            else:
                self._answer(instance, numbers[0], now_s)

    def _finish(self, instance: int, numbers: list[int], now_s: float) -> None:
        """A batch has been computed: first tokens go out, pages to the pool."""
        outcome, requests, costs = self.outcome, self._trace.requests, self._costs
        outcome.end_s = now_s
        to_store = 0
        for number in numbers:
            request = requests[number]
            outcome.ttft_s[number] = now_s - request.arrival_s
            self._waiting_tokens[instance] -= request.prompt_tokens
            to_store += request.prompt_tokens - outcome.device_tokens[number]
            to_store -= outcome.loaded_tokens[number]
            if request.answer_units:
                answered_s = now_s + 1e-3 * costs.answer_ms_per_token * request.answer_tokens
                self._later(answered_s, self._ANSWERED, instance, [number])
        if self._fleet.pool_tokens:
            self._later(now_s + costs.store_s(to_store), self._STORED, instance, numbers)
        if self._queues[instance]:
            self._start(instance, now_s)
        else:
            self._busy[instance] = False

    def _keep(self, numbers: list[int], now_s: float) -> None:
        """Pages have arrived in the pool. Those that it has are not written again."""
        pool, stored = self.pool, 0
        for number in numbers:
            units = self._trace.requests[number].units
            missing = [unit for unit in units if unit not in pool.held]
            if missing:
                stored += self._add(pool, missing, self._trace.requests[number])
        self._written(stored, now_s)

    def _answer(self, instance: int, number: int, now_s: float) -> None:
        """An answer is complete; so are the pages that it ends in."""
        request, pool, device = self._trace.requests[number], self.pool, self.devices[instance]
        whole = request.units
        if request.last_tokens != self._unit_tokens:
            whole = whole[:-1]
        device.use(reversed(whole + request.answer_units), self._unit_tokens)
        device.make_room()
        if self._fleet.pool_tokens:
            missing = [unit for unit in request.answer_units if unit not in pool.held]
            self._written(pool.use(missing, self._unit_tokens), now_s)

    def _written(self, tokens: int, now_s: float) -> None:
        self.pool.make_room()
        if tokens:
            self.outcome.stored_tokens += tokens
            self.outcome.stores.append((now_s, tokens))

    def _add(self, tier: Lru, units: list[int], request: Request) -> int:
        """Units of this request to a tier, in this order; its last one may be a shorter one."""
        if request.last_tokens == self._unit_tokens:
            return tier.use(units, self._unit_tokens)
        last = request.units[-1]
        if units[0] == last:  # ends of prefixes first
            return tier.use_one(last, request.last_tokens) + tier.use(units[1:], self._unit_tokens)
        if units[-1] == last:
            whole = tier.use(units[:-1], self._unit_tokens)
            return whole + tier.use_one(last, request.last_tokens)
        return tier.use(units, self._unit_tokens)

    # ---- a batch ---------------------------------------------------------------------------

    def _start(self, instance: int, now_s: float) -> None:
        """Take what fits one batch, read what the pool has of it, compute the rest."""
        costs = self._costs
        batch = self._take(instance)
        loading_s, read_tokens, computing_s, asked = 0.0, 0, 0.0, 0
        for start in batch:
            if start.loaded_tokens:
                loading_s += costs.load_s(start.loaded_tokens)
                read_tokens += start.loaded_tokens
            cached = start.device_tokens + start.loaded_tokens
            computing_s += 1e-3 * costs.request_ms
            computing_s += costs.compute_s(start.request.prompt_tokens - cached, cached)
            missing = start.request.prompt_tokens - start.device_tokens
            asked += missing > self._fleet.min_load_tokens
        if self._fleet.pool_tokens:
            loading_s += 1e-3 * costs.lookup_ms * asked
        if read_tokens:
            loading_s = self._over_the_wire(now_s, loading_s, read_tokens)
            self.outcome.loads.append((now_s, read_tokens))
        self.outcome.busy_s += loading_s + computing_s
        self._busy[instance] = True
        numbers = [start.number for start in batch]
        self._later(now_s + loading_s + computing_s, self._DONE, instance, numbers)

    def _over_the_wire(self, now_s: float, own_s: float, tokens: int) -> float:
        """How long a load takes when the whole pool has a limit too."""
        if not self._costs.pool_us_per_token:
            return own_s
        self._wire_free_s = max(now_s, self._wire_free_s)
        self._wire_free_s += 1e-6 * self._costs.pool_us_per_token * tokens
        return max(own_s, self._wire_free_s - now_s)

    def _take(self, instance: int) -> list[_Start]:
        """Requests of one batch. They find what is there before any of them has been computed."""
        queue, fleet = self._queues[instance], self._fleet
        batch: list[_Start] = []
        budget, room = fleet.batch_tokens, fleet.device_tokens
        while queue:
            start = self._match(instance, queue[0])
            if batch and (start.computed_tokens > budget or start.request.prompt_tokens > room):
                break
            queue.popleft()
            batch.append(start)
            budget -= start.computed_tokens
            room -= start.request.prompt_tokens
        device = self.devices[instance]
        for start in batch:
            units = start.request.units
            self.outcome.device_tokens[start.number] = start.device_tokens
            self.outcome.loaded_tokens[start.number] = start.loaded_tokens
            if start.loaded_tokens:
                self.pool.use(units[start.on_device : start.in_pool], self._unit_tokens)
            if units:
                self._add(device, list(reversed(units)), start.request)
            device.make_room()
        return batch

    def _match(self, instance: int, number: int) -> _Start:
        request = self._trace.requests[number]
        on_device = self.devices[instance].matched(request.units)
        device_tokens = self._tokens(request, on_device)
        in_pool, loaded_tokens = on_device, 0
        if self._fleet.pool_tokens:
            in_pool = self.pool.matched(request.units, on_device)
            loaded_tokens = self._tokens(request, in_pool) - device_tokens
            if loaded_tokens < self._fleet.min_load_tokens:
                in_pool, loaded_tokens = on_device, 0
        return _Start(number, request, on_device, in_pool, device_tokens, loaded_tokens)

    def _tokens(self, request: Request, units: int) -> int:
        """Of the first units of a prompt, as far as they can be used: one token is computed."""
        tokens = units * self._unit_tokens
        if units == len(request.units):
            tokens += request.last_tokens - self._unit_tokens if units else 0
            most = (request.prompt_tokens - 1) // self._page_tokens * self._page_tokens
            return min(tokens, most)
        return tokens


def slice_peak(moves: list[tuple[float, int]], start_s: float, end_s: float) -> float:
    """Tokens per second in the busiest slice of the time."""
    width_s = max((end_s - start_s) / SLICES, 1e-9)
    totals = [0] * SLICES
    for when_s, tokens in moves:
        totals[min(max(int((when_s - start_s) / width_s), 0), SLICES - 1)] += tokens
    return max(totals) / width_s
