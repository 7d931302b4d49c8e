# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""HiRadixCacheDirect: SGLang's radix cache with a pool behind it. Policy only.

Owns what is written back and when, how hits are attributed, and pages withheld for late calls.
The tree, its locks, matching and rank consensus are SGLang's; transfers are the controller's.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any, NamedTuple

from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from ascend_direct.errors import ConfigError
from ascend_direct.integration import hooks
from ascend_direct.integration.cache_controller import CacheControllerDirect
from ascend_direct.integration.decode_offload import DecodeOffload

logger = logging.getLogger(__name__)

# Rounds between looks for a store that hangs in its native call: each look is a reduction.
LATE_STORE_ROUNDS = 32
LEVELS_INTERVAL_S = 1.0


class _LateStore(NamedTuple):
    """A node whose store was given up while its native call still reads the node's pages."""

    node_id: Any
    lock: Any
    returned: threading.Event


class HiRadixCacheDirect(UnifiedRadixCache):
    """`UnifiedRadixCache` linked to a pool by a `CacheControllerDirect`."""

    def __init__(self, params: Any) -> None:
        self.late_stores: list[_LateStore] = []
        self._rounds = 0
        self._status_due_s = 0.0
        self._levels_due_s = 0.0
        super().__init__(params)

    @property
    def direct_controller(self) -> CacheControllerDirect:
        """The linker. SGLang's own `cache_controller` stays None: it is HiCache's."""
        controller: CacheControllerDirect = self.linker.cache_linker
        return controller

    def init_cache_linker(self, cache_linker: Any) -> None:
        """Attach the linker, then apply the write policy that SGLang's wrapper fixes to 1."""
        if not isinstance(cache_linker, CacheControllerDirect):
            raise ConfigError([f"the linker is a {type(cache_linker).__name__}, not ours."])
        hooks.install(cache_linker.detach)
        if cache_linker.look_ahead is not None:
            hooks.install_look_ahead(self, cache_linker.look_ahead)
        super().init_cache_linker(cache_linker)
        cache_linker.metrics.join(self)
        config = cache_linker.config
        if cache_linker.decodes:
            hooks.install_decode(DecodeOffload(self, cache_linker))
        if config.write_policy == "write_through_selective":
            self.write_through_threshold = config.selective_hits

    def init_load_back(self, params: Any) -> Any:
        """Load, and attribute the hit to storage: SGLang counts linker hits as host hits."""
        req = params.req
        from_pool = self.linker is not None and req is not None and self.linker.has_hit(req.rid)
        loaded = super().init_load_back(params)
        if from_pool and loaded is not None and loaded[0] > 0:
            req.host_hit_is_storage = True
            self.direct_controller.metrics.add(load_tokens=loaded[0])
        return loaded

    def finish_external_linker_loads(self, reqs: Any) -> Any:
        """A forward has been launched, for SGLang to fail requests whose load is still under way:
        none is here. The costs of prefills end at this point."""
        costs = None if self.linker is None else self.direct_controller.costs
        if costs is not None:
            costs.forward_launched(reqs)
        return super().finish_external_linker_loads(reqs)

    def check_hicache_events(self) -> None:
        """Once per scheduler round, on every rank: results of stores, slots and nodes set free."""
        controller = self.direct_controller
        controller.begin_round()
        self._surrender_late_store(controller)
        super().check_hicache_events()
        self._release_late_stores(controller)
        for slots in controller.release_quarantined():
            self.token_to_kv_pool_allocator.free(slots)
        self._log_status(controller)

    def _surrender_late_store(self, controller: CacheControllerDirect) -> None:
        """Report a store that hangs as failed, so that those behind it are not held up.

        Its node gets a lock of our own until the call returns: bytes of a recycled slot must never
        be stored under the old key.
        """
        pending = self.linker.pending_offloads
        self._rounds += 1
        if not pending or self._rounds % LATE_STORE_ROUNDS:
            return
        if not controller.ranks.any(controller.engine.stores.head_is_late()):
            return
        node_id = pending[0].lock_node_id
        lock = self.inc_lock_ref(node_id).to_dec_params()
        returned = controller.engine.stores.surrender_head()
        self.late_stores.append(_LateStore(node_id, lock, returned))
        logger.error("a store hangs in the pool; its node stays pinned until the call returns")

    def _release_late_stores(self, controller: CacheControllerDirect) -> None:
        if not self.late_stores:
            return
        flags = controller.ranks.smallest([int(s.returned.is_set()) for s in self.late_stores])
        held = []
        for store, quiet in zip(self.late_stores, flags, strict=True):
            if quiet:
                self.dec_lock_ref(store.node_id, store.lock)
            else:
                held.append(store)
        self.late_stores = held

    def protected_size(self) -> int:
        """Locked tokens and withheld ones: neither is free, neither can be evicted."""
        protected: int = super().protected_size()
        if self.linker is not None:
            protected += self.direct_controller.quarantined_tokens
        return protected

    def finish(self, handle: Any, outcome: Any) -> None:
        """End of an attempt that held no slots: an abort, or prefill's hand-over."""
        super().finish(handle, outcome)
        if self.linker is not None and self.direct_controller.look_ahead is not None:
            self.direct_controller.look_ahead.drop(self, handle.rid)
        self._forget_hit(handle.rid)

    def on_release(self, req: Any, *, checkpointed: bool) -> None:
        """End of an attempt that held slots. SGLang does not call `finish` for those."""
        super().on_release(req, checkpointed=checkpointed)
        self._forget_hit(req.rid)

    def claim_kv_row(self, req: Any) -> bool:
        """A streaming session keeps the slots; SGLang then calls neither of the two above."""
        if claimed := super().claim_kv_row(req):
            self._forget_hit(req.rid)
        return bool(claimed)

    def _forget_hit(self, rid: str) -> None:
        """Drop what is kept of a hit that was matched and never loaded."""
        if self.linker is not None:
            self.linker.hit_markers.pop(rid, None)
            self.direct_controller.forget_request(rid)

    def reset(self) -> None:
        """Flush the device cache; the pool keeps its pages."""
        super().reset()
        self.late_stores = []

    def _log_status(self, controller: CacheControllerDirect) -> None:
        interval_s = controller.config.log_interval_s
        now_s = time.monotonic()
        if controller.metrics.is_exported and now_s >= self._levels_due_s:
            self._levels_due_s = now_s + LEVELS_INTERVAL_S
            controller.show_levels()
        if not interval_s or now_s < self._status_due_s:
            return
        if self._status_due_s:
            logger.info("ascend_direct: %s", controller.metrics.status_line())
        self._status_due_s = now_s + interval_s
