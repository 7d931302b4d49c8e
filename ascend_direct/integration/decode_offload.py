# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""`--disaggregation-mode decode`: what SGLang's decode loop does not do for a linked cache.

Owns the round of a decode node: results of stores are collected, running answers are stored piece
by piece, and a prefill node whose pages cannot match is noticed. What a store is, is the
controller's; a decode node never loads (SGLang does not ask the linker there).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
from sglang.srt.mem_cache.radix_cache import RadixKey

from ascend_direct.integration.cache_controller import CacheControllerDirect

# Rounds between looks at the prefill nodes met so far: each look is a reduction.
PEER_ROUNDS = 64


class DecodeOffload:
    """One decode node's round.

    Args:
        cache: the node's `HiRadixCacheDirect`.
        controller: its linker.
    """

    def __init__(self, cache: Any, controller: CacheControllerDirect) -> None:
        self._cache = cache
        self._controller = controller
        self._stride_tokens = controller.config.decode_stride_tokens
        self._same_tp_only = controller.same_tp_only
        self._rounds = 0
        self._passed_over: dict[str, int] = {}  # rid → length at which another had its tokens

    def round(self, scheduler: Any) -> None:
        """Once per pass of the decode loop, on every rank."""
        self._cache.check_hicache_events()
        if self._same_tp_only and self._rounds % PEER_ROUNDS == 0:
            self._compare_peers(scheduler.disagg_decode_prealloc_queue.kv_manager)
        self._rounds += 1
        if self._stride_tokens:
            self.store_running(scheduler.running_batch.reqs)

    def store_running(self, reqs: Iterable[Any]) -> None:
        """Give the tree, and through it the pool, what running answers have grown by."""
        passed_over: dict[str, int] = {}
        for req in reqs:
            if req.finished() or req.skip_radix_cache_insert or not req.kv.holds_kv:
                continue
            # The last token's KV may still be under way on the forward stream: the store's fence
            # is recorded after it.
            known = len(req.origin_input_ids) + len(req.output_ids)
            end = min(known, req.kv.kv_committed_len)
            begin = max(req.kv.cache_protected_len, self._passed_over.pop(req.rid, 0))
            if end - begin >= self._stride_tokens and not self._checkpoint(req, end):
                begin = end
            if begin > req.kv.cache_protected_len:
                passed_over[req.rid] = begin
        self._passed_over = passed_over

    def _checkpoint(self, req: Any, end: int) -> bool:
        """False: passed over, because another request gave the tree these tokens."""
        req.refresh_fill_ids()
        key = RadixKey(
            req.full_untruncated_fill_ids[:end], req.extra_key, cache_salt=req.cache_salt
        )
        held = self._cache.match_prefix(MatchPrefixParams(key=key)).device_prefix_len
        if held > req.kv.cache_protected_len:
            # SGLang would free this one's slots while the forward under way reads them, and a
            # transfer from a prefill node writes into free slots without waiting for it. They
            # stay its own until it ends.
            return False
        self._cache.checkpoint(req, up_to=end)
        return True

    def _compare_peers(self, kv_manager: Any) -> None:
        mine = kv_manager.attn_tp_size
        nodes = list(kv_manager.prefill_info_table.values())  # a heartbeat thread drops some
        others = {info.attn_tp_size for info in nodes if info.attn_tp_size != mine}
        (worst,) = self._controller.ranks.smallest([-max(others, default=0)])
        if worst:
            self._same_tp_only = False
            self._controller.detach(
                f"a prefill node has {-worst} attention ranks, this decode node {mine}, and would "
                "not find these pages; use the same --tp-size, or set heads_per_object to the "
                "heads of a rank at the larger one on all servers"
            )
