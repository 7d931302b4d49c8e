# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""CacheControllerDirect: SGLang's linker contract, answered by the transfer engine.

Owns the translation (page hashes → store keys, device indices → page numbers), the agreement of
ranks on a load, and pages that a late load may still write to. SGLang owns the tree and all device
memory; transfer owns threads and deadlines. Every bool returned here is the same on every rank.
"""

from __future__ import annotations

import itertools
import logging
import time
from array import array
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import (
    LayerWiseLoadCounter,
    UnifiedCacheLinker,
)
from sglang.srt.mem_cache.utils import get_storage_hash_str

from ascend_direct.beliefs import LookupMemo, Suspects
from ascend_direct.integration import factory
from ascend_direct.integration.costs import Costs
from ascend_direct.integration.lookahead import LookAhead
from ascend_direct.integration.pool_layout import is_replicated, page_numbers
from ascend_direct.integration.replicas import WHOLE, ReadChoice
from ascend_direct.transfer import LoadOutcome, StoreJob

logger = logging.getLogger(__name__)


# Of lookup_timeout_ms: what one round may spend on asking the pool. A slow answer is no failure,
# but many of them in one round would hold up those who decode.
ROUND_TIMEOUTS = 2


class _Quarantined(NamedTuple):
    """Slots of a refused load that a native call may still write to."""

    slots: torch.Tensor
    outcome: LoadOutcome


class CacheControllerDirect(UnifiedCacheLinker):
    """Links one rank's KV pool to the shared pool.

    Constructed by SGLang's dynamic linker loader with `launch.resolve`'s hand-over as
    `extra_config`.
    """

    def __init__(
        self,
        server_args: Any,
        params: Any,
        *,
        components: Any,
        extra_config: dict[str, Any] | None = None,
        forward_stream: Any = None,
    ) -> None:
        parts = factory.build(server_args, params, components, extra_config or {})
        self.config = parts.config
        self.metrics = parts.metrics
        self.ranks = parts.ranks
        self.engine = parts.engine
        self.layout = parts.layout
        self._keys = parts.keys
        self._device = parts.device
        self._beliefs = parts.beliefs
        self._shard = parts.shard
        self._exchange = parts.exchange
        self._reading = ReadChoice(parts.config.replica_read)
        # Pages so far, the same on all ranks: shares go on where the last ones ended.
        self._offered_pages = 0
        self._loaded_pages = 0
        self._suspects = Suspects()
        self._memo = LookupMemo(parts.config.lookup_memo_ms / 1e3)
        self._asked_s = 0.0
        self._page_size = params.page_size
        self._min_pages = -(-parts.config.min_load_tokens // params.page_size)
        self._quarantine: deque[_Quarantined] = deque()
        self.detached = False
        self.forward_stream = forward_stream
        by_cost = parts.config.admission == "cost"
        self.costs = Costs(parts.device, forward_stream, params.page_size) if by_cost else None
        ahead = parts.config.load_mode == "lookahead"
        self.look_ahead = LookAhead(parts, forward_stream, self.costs) if ahead else None
        pool = params.token_to_kv_pool_allocator.get_kvcache()
        self.pools = {PoolName.KV: pool}
        self.decodes = server_args.disaggregation_mode == "decode"
        # Pages hold the heads of a rank, so only servers with as many ranks find them.
        self.same_tp_only = not (is_replicated(pool) or parts.config.heads_per_object)
        # Loads are complete before the forward starts: nothing ever waits on this counter.
        _warm_up_page_hash(params.page_size)
        self.layer_done_counter = LayerWiseLoadCounter(self.pools[PoolName.KV].layer_num)
        self._announce(parts.store_name)

    def _announce(self, store_name: str) -> None:
        logger.info(
            "ascend_direct: rank %d of %d linked to %s, %d-token pages of %d bytes in %d spans "
            "(%s), keys %s, options %s",
            self.ranks.rank,
            self.ranks.size,
            store_name,
            self._page_size,
            self.layout.page_bytes,
            len(self.layout.spans),
            self.layout.tag,
            self._keys.prefixes,
            self.config.describe(),
        )

    # ---- lookup ----------------------------------------------------------------------------

    def lookup(self, rid: str, transfers: list[PoolTransfer]) -> list[int]:
        """Every restorable prefix length in pages that is worth a load; [] when none is."""
        (transfer,) = transfers
        hashes: Sequence[str] = transfer.keys or ()
        if self.detached or len(hashes) < self._min_pages:
            return []
        self.metrics.add(lookups=1)
        if self.look_ahead is not None:
            self.look_ahead.note(rid, hashes)
            return []
        held = self._memo.recall(rid, hashes)
        if held is not None:
            self.metrics.add(lookups_from_memo=1)
        elif self._asked_s >= ROUND_TIMEOUTS * self.config.lookup_timeout_ms / 1e3:
            self.metrics.add(lookups_put_off=1)
            return []
        else:
            begin_s = time.monotonic()
            # Of pages that all ranks hold alike each rank asks for its share: SGLang intersects.
            held = self._ask(self._keys.keys(self._shard.of(hashes)))
            self._memo.note(rid, hashes, held)
            self._asked_s += time.monotonic() - begin_s
        hit = self._shard.prefix(held // self._keys.per_page, len(hashes))
        if self._suspects:  # of any rank's share: the others do not know
            whole = self._keys.keys(hashes[:hit])
            hit = self._suspects.clear_prefix(whole) // self._keys.per_page
        floor = self._min_pages
        if self.costs is not None and hit >= floor:
            floor = max(floor, self.costs.floor_pages(rid))
            self.metrics.add(hits_not_worth=int(hit < floor))
        self.metrics.add(lookup_hit_pages=hit if hit >= floor else 0)
        # SGLang sets a flag for each length, to intersect ranks: one rank needs the longest only.
        return [hit] if self.ranks.alone and hit >= floor else list(range(floor, hit + 1))

    def begin_round(self) -> None:
        """The scheduler is about to look at its waiting requests."""
        self._asked_s = 0.0

    def _ask(self, keys: Sequence[str]) -> int:
        if not self.engine.may_load:
            return 0
        # A pool in trouble is asked, if at all, about all keys: a load in vain costs device slots.
        believed = 0 if self.engine.in_trouble else self._beliefs.prefix(keys)
        if believed == len(keys):
            return believed
        held = self.engine.stored_prefix(keys[believed:])
        if held is None:
            return 0
        self._beliefs.confirm(keys[believed : believed + held])
        return believed + held

    def forget_request(self, rid: str) -> None:
        """The request is done; its lookup answer is of no more use."""
        self._memo.forget(rid)
        if self.look_ahead is not None:
            self.look_ahead.forget(rid)

    # ---- load ------------------------------------------------------------------------------

    def load(self, rid: str, transfers: list[PoolTransfer]) -> bool:
        """Read all pages now. True: every byte is in place on every rank. Same on all ranks."""
        if self.detached:
            self.metrics.add(loads_detached=1)
            return False
        (transfer,) = transfers
        slots = transfer.device_indices
        sharded = self._exchange is not None and self._reading.begin()
        shard = self._shard.shifted(self._loaded_pages) if sharded else WHOLE
        keys = self._keys.keys(shard.of(transfer.keys))
        outcome = self.engine.load(
            keys,
            lambda: shard.of(page_numbers(slots, self._page_size)),
            self._device.fence(self.forward_stream),
        )
        if self.costs is not None:
            self.costs.loaded(len(transfer.keys), outcome)
        landed, still = self._agree(outcome)
        self._memo.forget(rid)
        if outcome.landed:
            self._beliefs.confirm(keys)
        else:
            self._beliefs.doubt(outcome.bad_keys)
            self._suspects.add(outcome.suspect_keys)
        if sharded and not landed:  # who missed a page need not be who answers for it in lookups
            self._beliefs.doubt(self._keys.keys(transfer.keys))
        if not still:
            # SGLang frees what this names when the load is refused. A call that has not returned
            # may still write there, so the slots stay ours until it has, on every rank.
            self._quarantine.append(_Quarantined(slots, outcome))
            transfer.device_indices = slots[:0]
        if landed and self._exchange is not None:
            if sharded:
                pages = slots[:: self._page_size] // self._page_size
                self._exchange.share(pages, self._loaded_pages)
                self._loaded_pages += len(pages)
            self._reading.end(sharded, len(transfer.keys))
        return landed

    def _agree(self, outcome: LoadOutcome) -> tuple[bool, bool]:
        """Whether all ranks' loads landed, and whether all their native calls have returned."""
        mine = [int(outcome.landed), int(outcome.quiet), -self._reading.last_us_per_page]
        landed, quiet, cost = self.ranks.smallest(mine)
        self._reading.agreed(-cost)
        self.metrics.add(loads_elsewhere=int(outcome.landed and not landed))
        return bool(landed), bool(quiet)

    @property
    def quarantined_tokens(self) -> int:
        """Slots withheld from SGLang's allocator."""
        ahead = 0 if self.look_ahead is None else self.look_ahead.held_tokens
        return ahead + sum(held.slots.numel() for held in self._quarantine)

    def release_quarantined(self) -> list[torch.Tensor]:
        """Slots no rank's native call can touch any more, to be freed; same on all ranks."""
        if not self._quarantine:
            return []
        first = itertools.takewhile(lambda held: held.outcome.quiet, self._quarantine)
        (quiet,) = self.ranks.smallest([len(list(first))])
        return [self._quarantine.popleft().slots for _ in range(quiet)]

    def start_layer_wise_loading(self) -> int:
        """SGLang has built a prefill batch. -1: `load` has left nothing to wait for."""
        if self.costs is not None:
            self.costs.prefill_begins()
        return -1

    def finish_layer_wise_loading(self, counter_index: int) -> bool:
        """True: `load` has left nothing to wait for."""
        return True

    def cancel_queued_load(self, rid: str) -> bool:
        """True: no load is ever queued."""
        return True

    # ---- offload ---------------------------------------------------------------------------

    def offload(self, transfers: list[PoolTransfer], session_id: str | None = None) -> bool:
        """Queue one node's pages. A full queue is a failed store, reported in its turn: whether it
        is full differs between ranks, and what this returns must not."""
        if self.detached or self.config.write_policy == "off":
            return False
        hashes = [h for transfer in transfers for h in transfer.keys or ()]
        shard = self._shard.shifted(self._offered_pages)
        self._offered_pages += len(hashes)
        keys = self._keys.keys(shard.of(hashes))
        if self._beliefs.prefix(keys) == len(keys):
            self.metrics.add(store_skipped_pages=len(keys) // self._keys.per_page)
            keys = []
        slots = [transfer.device_indices.clone() for transfer in transfers] if keys else []
        self.engine.stores.submit(
            StoreJob(
                keys=keys,
                pages=lambda: shard.of(page_numbers(torch.cat(slots), self._page_size)),
                fence=self._device.fence(self.forward_stream),
                # All that the node pins here, of which this rank may store a share.
                size_bytes=len(hashes) * self.layout.page_bytes,
            )
        )
        return True

    def num_completed_offloads(self) -> int:
        """Results that can be popped; may differ between ranks, SGLang takes the smallest."""
        return self.engine.stores.completed()

    def pop_completed_offload(self) -> bool:
        """The oldest result."""
        return self.engine.stores.pop()

    def detach(self, reason: str) -> None:
        """Use the pool no more. Every rank gets the same request, so all detach at one point."""
        if not self.detached:
            self.detached = True
            if self.look_ahead is not None:
                self.look_ahead.detached = True
            logger.warning(
                "ascend_direct: %s; the pool is not used until the server is restarted", reason
            )

    def show_levels(self) -> None:
        """Tell the exporter what is queued, withheld and left alone now."""
        self.metrics.show(
            store_queue_bytes=self.engine.stores.held_bytes,
            withheld_tokens=self.quarantined_tokens,
            least_load_tokens=0 if self.costs is None else self.costs.least_tokens,
            pool_left_alone=int(self.engine.in_trouble),
            loads_left_alone=int(self.engine.loads_in_trouble),
        )

    # ---- lifecycle -------------------------------------------------------------------------

    def reset(self) -> None:
        """Quiesce. The shared pool keeps its pages; SGLang takes back all slots after this."""
        if self.look_ahead is not None:
            self.look_ahead.reset()
        self.engine.quiesce()
        self._memo.clear()
        self._quarantine.clear()
        self.layer_done_counter.reset()

    def close(self) -> None:
        """Quiesce within bounds and let the pool go."""
        begin = time.monotonic()
        self.engine.close()
        logger.info(
            "ascend_direct: %s; closed in %.1f s",
            self.metrics.status_line(),
            time.monotonic() - begin,
        )


def _warm_up_page_hash(page_size: int) -> None:
    """SGLang compiles its page hash at first use, which takes ten seconds: not in a request."""
    get_storage_hash_str(RadixKey(array("q", range(page_size))), None, page_size=page_size)
