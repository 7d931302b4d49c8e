# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""A serving instance inside this process: real SGLang pools, tree, admission and our cache.

Owns what a scheduler does around one prefix cache: admit (through SGLang's `PrefillAdder`),
allocate (`ScheduleBatch.prepare_for_extend`), checkpoint, release, retract, abort. The model is
`oracle`'s: before each forward the bytes of the whole prefix are compared with what it computes.
Does not own the checks of memory accounting (audit does).
"""

from __future__ import annotations

import itertools
import threading
import time
import types
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from sglang.srt.managers.schedule_batch import (
    FINISH_ABORT,
    Req,
    ScheduleBatch,
    release_req,
)
from sglang.srt.managers.schedule_policy import PrefillAdder
from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import CacheRequestOutcome
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.common import checkpoint_kv_cache, release_kv_cache
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.mem_cache.registry import TreeCacheBuildContext, create_tree_cache
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from ascend_direct.integration.cache_controller import CacheControllerDirect
from ascend_direct.integration.hooks import promised_tokens
from ascend_direct.integration.radix_cache import HiRadixCacheDirect

from ..fakes.memory_store import MemoryPool, MemoryStore
from .kv_pools import HEADS, make_kv_pool, planes_of
from .launching import command_line, published, store_is, with_flag
from .oracle import VOCAB_SIZE, Ledger, States, next_token, seed_of
from .served import Phase, Served

CONTEXT = 640
NEW_TOKEN_RATIO = 0.5
WHOLE = 8192  # a chunk that holds any prompt: SGLang's default
_RIDS = itertools.count()


class Instance:
    """One rank of one server.

    Args:
        shared: the pool that instances share.
        ledger: where pages this instance may store are noted.
        model: part of the namespace and of every byte that is computed.
        config: options that differ from `launching.TEST_CONFIG`.
        core: tree core, ``rust`` or ``python``.
        tokens: size of the KV pool.
        group: gloo group of the attention-TP ranks.
    """

    def __init__(
        self,
        shared: MemoryPool,
        ledger: Ledger,
        *,
        kind: str = "gqa",
        model: str = "test-model",
        page_size: int = 16,
        core: str = "rust",
        tokens: int = 1024,
        config: Mapping[str, Any] | None = None,
        group: Any = None,
    ) -> None:
        self.store = MemoryStore(shared)
        self.ledger = ledger
        self.page_size = page_size
        self.model = model
        self.group = group
        rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        share = HEADS // size
        heads = tuple(range(rank * share, (rank + 1) * share))
        before = set(threading.enumerate())
        with store_is(self.store):
            options = {"model_id": model, **(config or {})}
            args = published(command_line(*with_flag(options), page_size=page_size))
            self.kv_pool = make_kv_pool(kind, tokens, page_size, share)
            self.planes = planes_of(self.kv_pool, heads)
            self.allocator = PagedTokenToKVPoolAllocator(
                tokens, page_size, torch.bfloat16, "cpu", self.kv_pool, need_sort=False
            )
            self.rows = ReqToTokenPool(
                size=8, max_context_len=CONTEXT, device="cpu", enable_memory_saver=False
            )
            self.counters: list[Any] = []
            self.tree = create_tree_cache(self._context(args, core, group))
        assert isinstance(self.tree, HiRadixCacheDirect)
        self.controller: CacheControllerDirect = self.tree.direct_controller
        self.look_ahead = self.controller.look_ahead
        self.threads = set(threading.enumerate()) - before
        self.requests: list[Served] = []
        self._model_config = types.SimpleNamespace(
            is_encoder_decoder=False, vocab_size=VOCAB_SIZE, is_hybrid_swa=False
        )

    def _context(self, args: Any, core: str, group: Any) -> TreeCacheBuildContext:
        params = CacheInitParams(
            disable=False,
            req_to_token_pool=self.rows,
            token_to_kv_pool_allocator=self.allocator,
            page_size=self.page_size,
            tp_cache_group=group,
            attn_tp_cache_group=group,
            tree_core_backend=core,
        )
        worker = types.SimpleNamespace(
            model_runner=types.SimpleNamespace(forward_stream=None),
            register_hicache_layer_transfer_counter=self.counters.append,
        )
        return TreeCacheBuildContext(
            server_args=args,
            params=params,
            is_hybrid_swa=False,
            is_hybrid_ssm=False,
            enable_hierarchical_cache=False,
            disable_radix_cache=False,
            tp_worker=worker,
            model_config=None,
            tp_size=1,
            tp_rank=0,
            tp_group=None,
        )

    # ---- what a scheduler does with a request ------------------------------------------------

    def submit(
        self,
        tokens: Sequence[int],
        *,
        new_tokens: int = 2,
        rid: str | None = None,
        lora: str | None = None,
        salt: str | None = None,
        extra_key: str | None = None,
    ) -> Served:
        """Put a request into the waiting queue."""
        sampling = SamplingParams(temperature=0, max_new_tokens=new_tokens, ignore_eos=False)
        sampling.normalize(None)
        req = Req(
            rid=rid or f"request-{next(_RIDS)}",
            origin_input_text="",
            origin_input_ids=array("q", tokens),
            sampling_params=sampling,
            vocab_size=VOCAB_SIZE,
            lora_id=lora,
            cache_salt=salt,
            extra_key=extra_key,
        )
        # An adapter changes KV; a salt and an extra key only keep it apart, for bytes may not show.
        served = Served(req, seed_of(self.model, lora, salt, extra_key))
        self.requests.append(served)
        return served

    def round(self) -> None:
        """What precedes each scheduling decision."""
        if self.look_ahead is not None:
            waiting = [s.req for s in self.requests if s.phase is Phase.WAITING]
            self.look_ahead.round(self.tree, waiting, self._promised())
        self.tree.check_hicache_events()

    def _promised(self) -> int:
        chunked = next((s.req for s in self.requests if s.phase is Phase.CHUNKED), None)
        running = [s.req for s in self.requests if s.phase is Phase.RUNNING]
        return promised_tokens(chunked, running, NEW_TOKEN_RATIO)

    def match(self, served: Served) -> None:
        """What SGLang does in each round with a waiting request."""
        served.req.init_next_round_input(self.tree)

    def prefill(self, served: Served, chunk: int | None = None, *, abort: bool = False) -> bool:
        """Schedule and run the next prefill batch of a request.

        Args:
            chunk: most tokens to compute now.
            abort: the client leaves while the forward runs.

        Returns:
            False when SGLang did not admit it: it waits.
        """
        self.round()
        adder = self._adder(WHOLE if chunk is None else chunk)
        req = served.req
        if served.phase is Phase.CHUNKED:
            checkpoint_kv_cache(req, self.tree)
            req.init_next_round_input()
            unfinished = adder.add_chunked_req(req)
            if not adder.can_run_list:
                return False
        else:
            assert served.phase is Phase.WAITING
            if self.look_ahead is not None and self.look_ahead.holds(req.rid):
                return False
            self.match(served)
            adder.add_one_req(req, has_chunked_req=False, truncation_align_size=None)
            if not adder.can_run_list:
                return False
            unfinished = adder.new_chunked_req
        self._extend(served, unfinished)
        if abort:
            req.to_finish = FINISH_ABORT()
        self._prefill_result(served, unfinished is not None)
        return True

    def _adder(self, chunk: int) -> PrefillAdder:
        running = [s.req for s in self.requests if s.phase is Phase.RUNNING]
        return PrefillAdder(
            self.page_size,
            self.tree,
            self.allocator,
            ScheduleBatch(reqs=running),
            new_token_ratio=NEW_TOKEN_RATIO,
            rem_input_tokens=16384,
            rem_chunk_tokens=chunk,
        )

    def _extend(self, served: Served, unfinished: Req | None) -> None:
        """Build the batch, check what is cached, compute the rest."""
        req = served.req
        batch = self._batch(req, unfinished)
        batch.hicache_consumer_index = self.tree.ready_to_load_host_cache()
        for counter in self.counters:
            counter.set_consumer(batch.hicache_consumer_index)
        batch.prepare_for_extend()
        self.check_bytes(served, req.prefix_len)
        self._compute(served, req.prefix_len, req.extend_end)
        assert self.tree.finish_external_linker_loads([req]) == []
        served.batch = batch

    def _batch(self, req: Req, unfinished: Req | None) -> ScheduleBatch:
        return ScheduleBatch.init_new(
            [req],
            self.rows,
            self.allocator,
            self.tree,
            self._model_config,
            False,
            SpeculativeAlgorithm.NONE,
            chunked_req=unfinished,
        )

    def _prefill_result(self, served: Served, unfinished: bool) -> None:
        req = served.req
        if unfinished:
            served.phase = Phase.CHUNKED
            return
        served.phase = Phase.RUNNING
        self._sample(served)
        if not self._release_if_finished(served):
            checkpoint_kv_cache(req, self.tree)

    def decode(self, served: Served) -> None:
        """One decode step; room for it must have been checked with `has_room`."""
        assert served.phase is Phase.RUNNING
        assert served.batch is not None
        self.round()
        before = len(served.tokens) - 1
        served.batch.prepare_for_decode()
        self.check_bytes(served, before)
        self._compute(served, before, before + 1)
        self._sample(served)
        self._release_if_finished(served)

    def has_room(self, tokens: int) -> bool:
        """Whether this many slots can be had, evicting where needed."""
        return self.allocator.available_size() + self.tree.evictable_size() >= tokens

    def _sample(self, served: Served) -> None:
        served.req.output_ids.append(next_token(served.states[-1]))
        served.req.update_finish_state()

    def _release_if_finished(self, served: Served) -> bool:
        if not served.req.finished():
            return False
        release_kv_cache(served.req, self.tree, checkpoint=True)
        self._done(served)
        return True

    def _done(self, served: Served) -> None:
        served.phase = Phase.DONE
        self.requests.remove(served)

    def serve(
        self, tokens: Sequence[int], *, chunk: int | None = None, new_tokens: int = 2, **more: Any
    ) -> Served:
        """A request from arrival to its end."""
        served = self.submit(tokens, new_tokens=new_tokens, **more)
        while served.phase is not Phase.RUNNING and served.phase is not Phase.DONE:
            admitted = self.prefill(served, chunk) or self._is_held(served)
            assert admitted, "not admitted although nothing else runs"
        while served.phase is Phase.RUNNING:
            self.decode(served)
        return served

    def _is_held(self, served: Served) -> bool:
        """Look-ahead keeps the request back for now; give its threads the interpreter."""
        held = self.look_ahead is not None and self.look_ahead.holds(served.req.rid)
        if held:
            time.sleep(0.0005)
        return held

    def abort(self, served: Served) -> None:
        """The client has left."""
        req = served.req
        if served.phase is Phase.RUNNING:  # ends with the next result, which is kept
            req.to_finish = FINISH_ABORT()
            self.decode(served)
            return
        self.tree.finish(req.cache_request_handle, CacheRequestOutcome.ABORT)
        if served.phase is Phase.CHUNKED:
            req.finished_reason = FINISH_ABORT()
            release_kv_cache(req, self.tree, checkpoint=False)
        self._done(served)

    def retract(self, served: Served) -> None:
        """Take a running request's memory; it will be prefilled again."""
        assert served.phase is Phase.RUNNING
        release_req(
            req=served.req,
            remaing_req_count=0,
            req_to_token_pool=self.rows,
            token_to_kv_pool_allocator=self.allocator,
            tree_cache=self.tree,
            hisparse_coordinator=None,
        )
        served.phase = Phase.WAITING
        served.batch = None

    # ---- the model ---------------------------------------------------------------------------

    def _compute(self, served: Served, begin: int, end: int) -> None:
        """Write the KV of tokens begin … end, and note the pages that are now whole."""
        slots = self.slots(served, end)[begin:]
        states = served.states[begin:end]
        for part, memory in self.planes:
            memory[slots] = part.kv_bytes(states)
        size, parts = self.page_size, [plane.part for plane in self.planes]
        hashes = served.hashes(end // size * size, size)
        for page in range(begin // size, end // size):
            keys = self.controller._keys.keys(hashes[page : page + 1])
            self.ledger.note(keys, parts, served.states[page * size : (page + 1) * size])

    def keys(self, served: Served, length: int) -> list[str]:
        """Store keys of the leading pages of a request."""
        return self.controller._keys.keys(served.hashes(length, self.page_size))

    def slots(self, served: Served, length: int) -> np.ndarray:
        """Where the first tokens of a request lie."""
        row = self.rows.req_to_token[served.req.kv.req_pool_idx, :length]
        return row.numpy().astype(np.int64)

    def check_bytes(self, served: Served, length: int) -> None:
        """The first `length` tokens hold what this model computes for them."""
        slots = self.slots(served, length)
        assert len(set(slots.tolist())) == length, "a slot occurs twice in a request's row"
        self.check_slots(slots, served.states[:length])

    def check_slots(self, slots: np.ndarray, states: States) -> None:
        """These slots hold the KV of these states, in every plane."""
        for part, memory in self.planes:
            right = memory[slots] == part.kv_bytes(states)
            wrong = np.flatnonzero(~right.all(axis=1))
            assert not len(wrong), (
                f"{len(wrong)} of {len(slots)} tokens of layer {part.layer} {part.part} do not "
                f"hold their KV, the first at position {wrong[0]}, slot {slots[wrong[0]]}"
            )

    # ---- the end -----------------------------------------------------------------------------

    def flush(self) -> None:
        """`/flush_cache`: only while nothing runs."""
        assert not self.requests
        self.tree.reset()
        self.rows.free_slots = list(range(1, self.rows.size + 1))
        self.allocator.clear()

    def close(self) -> None:
        """The scheduler process ends."""
        self.tree.release_host_resources()
        for thread in self.threads:
            thread.join(10)
            assert not thread.is_alive(), f"thread {thread.name} outlived close()"
