# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""`load_mode: lookahead`: pages of waiting requests are read while the scheduler goes on with
others.

Owns the requests it looks ahead for: what they wait for, the device slots they are given, and the
moment their pages join the tree. From then on a request finds them as it finds any cached prefix.
Does not own threads and native calls (transfer), the tree (SGLang), or when it is called (hooks).

A request is held back from scheduling while the pool is asked and its pages are read, for
`load_timeout_ms` in all at most; whatever goes wrong, it is then scheduled without, and recomputes.
Decisions are taken in `round`, once per scheduler round on every rank, from one reduction over what
the ranks know; whether there is one depends on the list of requests, the same on all ranks.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams
from sglang.srt.mem_cache.radix_cache import RadixKey

from ascend_direct.beliefs import Suspects
from ascend_direct.integration.costs import Costs
from ascend_direct.integration.factory import Parts
from ascend_direct.integration.pool_layout import page_numbers
from ascend_direct.integration.replicas import WHOLE
from ascend_direct.store.base import PageStatus
from ascend_direct.transfer import LoadOutcome, Ticket

# Requests looked ahead for at one time. Their reads queue up behind each other anyway.
MOST_REQUESTS = 16
PENDING = -1


class _Question:
    """How many leading pages the pool holds, on this rank."""

    def __init__(
        self, parts: Parts, suspects: Suspects, hashes: Sequence[str], floor_pages: int
    ) -> None:
        """`floor_pages`: fewer are not worth a load."""
        self._parts = parts
        self._floor_pages = floor_pages
        whole = parts.keys.keys(hashes) if suspects else ()
        clear = suspects.clear_prefix(whole) // parts.keys.per_page if whole else len(hashes)
        self._total = min(clear, len(hashes))
        self._keys = parts.keys.keys(parts.shard.of(hashes))
        # A hit that is not loaded in the end costs device slots and the pages evicted for them.
        due = parts.engine.loads_due
        self._believed = 0 if parts.engine.in_trouble else parts.beliefs.prefix(self._keys)
        unknown = self._keys[self._believed :]
        self._ticket = parts.engine.ask_ahead(unknown) if unknown and due else None
        self._pages: int | None = None
        if self._ticket is None:
            self._pages = self._prefix(0) if due else 0

    def answer(self) -> int:
        """Pages that can be had; PENDING until the pool has answered, 0 when it cannot."""
        if self._pages is None and self._ticket is not None and self._ticket.returned:
            held = self._parts.engine.told(self._ticket)
            new = self._keys[self._believed : self._believed + (held or 0)]
            self._parts.beliefs.confirm(new)
            self._pages = 0 if held is None else self._prefix(held)
        return PENDING if self._pages is None else self._pages

    def _prefix(self, held: int) -> int:
        pages = (self._believed + held) // self._parts.keys.per_page
        pages = self._parts.shard.prefix(pages, self._total)
        if pages >= self._floor_pages:
            return pages
        self._parts.metrics.add(hits_not_worth=int(pages > 0))
        return 0

    def cancel(self, *, late: bool) -> None:
        """Its request goes on without, because the answer is late or for a reason of its own."""
        if self._ticket is not None and not self._ticket.returned:
            self._ticket.cancelled = True
            if late:
                self._parts.engine.no_answer()


class _Reading:
    """Pages on their way into slots, on this rank."""

    def __init__(
        self,
        parts: Parts,
        suspects: Suspects,
        hashes: Sequence[str],
        slots: torch.Tensor,
        shifted_by: int | None,
        stream: Any,
    ) -> None:
        """`shifted_by`: how far the ranks' shares are shifted; None when each reads all."""
        page_size = parts.layout.page_size_tokens
        shard = WHOLE if shifted_by is None else parts.shard.shifted(shifted_by)
        self.slots = slots
        self.shifted_by = shifted_by
        self._parts = parts
        self._suspects = suspects
        self._keys = parts.keys.keys(shard.of(hashes))
        self._ticket: Ticket[list[PageStatus]] | None = parts.engine.read_ahead(
            self._keys,
            lambda: shard.of(page_numbers(slots, page_size)),
            parts.device.fence(stream),
        )
        self.outcome: LoadOutcome | None = None if self._ticket else LoadOutcome(False)

    def answer(self) -> int:
        """1 when every page of this rank's share has landed, 0 when not; PENDING until the call
        has returned."""
        if self.outcome is None and self._ticket is not None and self._ticket.returned:
            # One that was given up says nothing of the pool: it has been counted, or cut off.
            given_up = self._ticket.cancelled
            outcome = LoadOutcome(False)
            if not given_up:
                outcome = self._parts.engine.outcome(self._ticket, self._keys)
            self.outcome = outcome
            if outcome.landed:
                self._parts.beliefs.confirm(self._keys)
            else:
                self._parts.beliefs.doubt(outcome.bad_keys)
                self._suspects.add(outcome.suspect_keys)
        return PENDING if self.outcome is None else int(self.outcome.landed)

    def cancel(self, *, late: bool) -> None:
        """As of a question; the call ends at its next safe point."""
        if self._ticket is not None and not self._ticket.returned:
            self._ticket.cancelled = True
            if late:
                self._parts.engine.gave_up(self._keys)


@dataclass(eq=False)
class _Ahead:
    """A request looked ahead for, or, once it has gone on without, what a call may still write to.

    Attributes:
        prefix_tokens: cached on the device when it came; `lock` keeps the node they end at.
        hashes: page hashes of what follows.
        due_s: when it goes on without.
    """

    req: Any
    prefix_tokens: int
    node_id: Any
    lock: Any
    hashes: Sequence[str]
    question: _Question
    due_s: float
    reading: _Reading | None = None

    def answer(self) -> int:
        """What this rank knows of the step the request is at."""
        return (self.reading or self.question).answer()


class LookAhead:
    """Reads the pages of waiting requests into the tree.

    Args:
        parts: what the controller drives.
        stream: SGLang's forward stream, for fences.
        costs: with `admission: cost`.
    """

    def __init__(self, parts: Parts, stream: Any, costs: Costs | None) -> None:
        self._parts = parts
        self._stream = stream
        self._costs = costs
        self._suspects = Suspects()
        # Set when the pool must not be used any more; what is on its way is then thrown away.
        self.detached = False
        self._page_size = parts.layout.page_size_tokens
        self._min_pages = -(-parts.config.min_load_tokens // self._page_size)
        pool_tokens = (parts.layout.num_pages - 1) * self._page_size
        self._most_tokens = parts.config.lookahead_percent * pool_tokens // 100
        self._sharded = parts.exchange is not None and parts.config.replica_read != "every_rank"
        self._hashes: dict[str, Sequence[str]] = {}
        self._ahead: dict[str, _Ahead] = {}
        self._left: list[_Ahead] = []
        self._seen: set[str] = set()
        self._read_pages = 0
        self._promised_tokens = 0

    # ---- what others see -------------------------------------------------------------------

    def note(self, rid: str, hashes: Sequence[str]) -> None:
        """What SGLang's match has found missing on the device."""
        if rid not in self._seen:
            self._hashes[rid] = hashes

    def holds(self, rid: str) -> bool:
        """Whether this request must not be scheduled yet. The same on all ranks."""
        return rid in self._ahead

    @property
    def held_tokens(self) -> int:
        """Slots that calls may be writing to: neither free nor in the tree."""
        readings = (one.reading for one in (*self._ahead.values(), *self._left))
        return sum(reading.slots.numel() for reading in readings if reading is not None)

    @property
    def held_requests(self) -> int:
        """Requests that must not be scheduled yet."""
        return len(self._ahead)

    def forget(self, rid: str) -> None:
        """The request has ended, or given its memory back; should it wait again, look again."""
        self._seen.discard(rid)
        self._hashes.pop(rid, None)

    def drop(self, cache: Any, rid: str) -> None:
        """The request has been aborted while it waited."""
        if rid in self._ahead:
            self._leave(cache, self._ahead[rid], late=False)

    def reset(self) -> None:
        """Forget everything, together with the tree; slots are the caller's once all calls have
        returned."""
        for one in self._ahead.values():
            (one.reading or one.question).cancel(late=False)
        self._ahead.clear()
        self._left.clear()
        self._seen.clear()
        self._hashes.clear()

    # ---- once per round --------------------------------------------------------------------

    def round(self, cache: Any, waiting: Sequence[Any], promised_tokens: int) -> None:
        """Act on what has come in, then look ahead for further requests. On every rank.

        Args:
            cache: the tree the pages join.
            waiting: SGLang's waiting queue.
            promised_tokens: slots that requests already scheduled will need.
        """
        self._promised_tokens = promised_tokens
        self._advance(cache)
        for req in waiting:
            if len(self._ahead) >= MOST_REQUESTS or self._room(cache) <= 0:
                break
            if req.rid not in self._seen:
                self._begin(cache, req)

    def _room(self, cache: Any) -> int:
        """Slots that may be taken: SGLang does not look again before it uses promised ones."""
        free: int = cache.token_to_kv_pool_allocator.available_size()
        evictable: int = cache.evictable_size()
        return free + evictable - self._promised_tokens

    def _begin(self, cache: Any, req: Any) -> None:
        """Match a request on the device and ask the pool for the rest."""
        # Not those of an earlier match: its prefix may have been shorter, and a match that finds
        # hardly anything missing does not ask.
        self._hashes.pop(req.rid, None)
        req.init_next_round_input(cache, cow_mamba=False)
        hashes = self._hashes.pop(req.rid, ())
        self._seen.add(req.rid)
        # Its prefix will be locked, and cannot be evicted for a promise any more.
        if len(hashes) < self._min_pages or self._room(cache) < req.prefix_len:
            return
        floor_pages = 0 if self._costs is None else self._costs.floor_pages(req.rid)
        self._ahead[req.rid] = _Ahead(
            req,
            req.prefix_len,
            req.last_node,
            cache.inc_lock_ref(req.last_node).to_dec_params(),
            hashes,
            _Question(self._parts, self._suspects, hashes, floor_pages),
            time.monotonic() + self._parts.config.load_timeout_ms / 1e3,
        )

    def _advance(self, cache: Any) -> None:
        ones = [*self._ahead.values(), *self._left]
        if not ones:
            return
        now_s = time.monotonic()
        known = [one.answer() for one in ones] + [int(now_s < one.due_s) for one in ones]
        agreed = self._parts.ranks.smallest(known)
        answers, in_time = agreed[: len(ones)], agreed[len(ones) :]
        for one, answer, timely in zip(ones, answers, in_time, strict=True):
            if one.reading is None:
                if answer != PENDING and self._is_next(cache, answer):
                    self._read(cache, one, answer)
                elif not timely:
                    self._give_up(cache, one)
            elif answer != PENDING:
                self._finish(cache, one, landed=bool(answer))
            elif not timely and one not in self._left:
                self._give_up(cache, one)

    def _is_next(self, cache: Any, pages: int) -> bool:
        """Whether to go on now, and not when there is more room."""
        tokens = pages * self._page_size
        if pages < self._min_pages or tokens > self._most_tokens:
            return True  # and without
        return self.held_tokens + tokens <= self._most_tokens and tokens <= self._room(cache)

    def _read(self, cache: Any, one: _Ahead, pages: int) -> None:
        """Start to read, if that is worth while and there is room."""
        pages -= self._catch_up(cache, one)
        slots = self._allocate(cache, pages) if pages >= self._min_pages else None
        if slots is None:
            self._end(cache, one)
            return
        one.hashes = one.hashes[:pages]
        shifted_by = self._read_pages if self._sharded else None
        self._read_pages += pages
        one.reading = _Reading(
            self._parts, self._suspects, one.hashes, slots, shifted_by, self._stream
        )

    def _catch_up(self, cache: Any, one: _Ahead) -> int:
        """Pages that other requests have brought to the device since the pool was asked."""
        req = one.req
        req.init_next_round_input(cache, cow_mamba=False)
        pages: int = (req.prefix_len - one.prefix_tokens) // self._page_size
        if pages:
            cache.dec_lock_ref(one.node_id, one.lock)
            one.prefix_tokens, one.node_id = req.prefix_len, req.last_node
            one.lock = cache.inc_lock_ref(one.node_id).to_dec_params()
            one.hashes = one.hashes[pages:]
        return pages

    def _allocate(self, cache: Any, pages: int) -> torch.Tensor | None:
        """Slots for pages, free ones or evicted ones; None when there are too few of either."""
        allocator, tokens = cache.token_to_kv_pool_allocator, pages * self._page_size
        if tokens > self._most_tokens:
            return None
        shortfall = tokens - allocator.available_size()
        if shortfall > 0:
            cache.evict(EvictParams(num_tokens=shortfall))
        slots: torch.Tensor | None = allocator.alloc(tokens)
        return slots

    def _finish(self, cache: Any, one: _Ahead, *, landed: bool) -> None:
        """All ranks' calls have returned: into the tree with the pages, or away with the slots."""
        assert one.reading is not None
        slots, shifted_by = one.reading.slots, one.reading.shifted_by
        if self._costs is not None and one.reading.outcome is not None:
            self._costs.loaded(len(one.hashes), one.reading.outcome)
        if landed and one not in self._left and not self.detached:
            if self._parts.exchange is not None and shifted_by is not None:
                self._parts.exchange.share(slots[:: self._page_size] // self._page_size, shifted_by)
            self._publish(cache, one, slots)
        else:
            cache.token_to_kv_pool_allocator.free(slots)
            if shifted_by is not None:  # who missed a page need not be who answers for it
                self._parts.beliefs.doubt(self._parts.keys.keys(one.hashes))
        self._end(cache, one)

    def _publish(self, cache: Any, one: _Ahead, slots: torch.Tensor) -> None:
        """Insert the pages behind their prefix; SGLang frees those it has got meanwhile."""
        req, begin = one.req, one.prefix_tokens
        end = begin + slots.numel()
        tokens = req.full_untruncated_fill_ids[:end]
        prefix = cache.path_device_indices(one.node_id)[:begin]
        cache.insert(
            InsertParams(
                key=RadixKey(tokens, req.extra_key, cache_salt=req.cache_salt),
                value=torch.cat([prefix, slots]),
                prev_prefix_len=begin,
                inserted_len=begin,
                priority=req.priority or 0,
            )
        )
        req.storage_hit_start, req.storage_hit_length = begin, slots.numel()
        self._parts.metrics.add(load_tokens=slots.numel())

    def _give_up(self, cache: Any, one: _Ahead) -> None:
        self._parts.metrics.add(lookahead_given_up=1)
        self._leave(cache, one, late=True)

    def _leave(self, cache: Any, one: _Ahead, *, late: bool) -> None:
        """The request goes on without; slots stay ours until no rank's call can write to them."""
        (one.reading or one.question).cancel(late=late)
        if one.reading is None:
            self._end(cache, one)
            return
        del self._ahead[one.req.rid]
        self._left.append(one)

    def _end(self, cache: Any, one: _Ahead) -> None:
        cache.dec_lock_ref(one.node_id, one.lock)
        if one in self._left:
            self._left.remove(one)
        else:
            del self._ahead[one.req.rid]
