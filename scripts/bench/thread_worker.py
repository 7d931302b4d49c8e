# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Times what the cache takes from the scheduler thread: lookups, loads, offloads, idle rounds.

SGLang's real radix cache with the real controller on a MemCache pool, in a process of its own; this
thread is the scheduler's. Owns the measurement; `bench.transfer` owns the pool and what is shown.
What is "ours" is the time that a call keeps the thread, less the time of the native calls in it.
"""

from __future__ import annotations

import functools
import json
import os
import random
import tempfile
import time
import types
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")  # read by SGLang while it is imported

import torch
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.registry import TreeCacheBuildContext, create_tree_cache
from sglang.srt.mem_cache.utils import get_storage_hash_str
from sglang.srt.plugins import load_plugins
from sglang.srt.runtime_context import publish
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import prepare_server_args
from sglang_cpu.models import make_model

from ascend_direct import names
from bench import worker

PAGE_TOKENS = 64
# Qwen2.5-0.5B; the model folder below has as many KV heads, which is all that is read of it.
LAYERS, HEADS, HEAD_DIM = 24, 2, 64
VOCABULARY = 32_000
IDLE_ROUNDS = 200
STORED_TIMEOUT_S = 60.0
ALLOWED = {
    "memcache": {"connect_timeout_ms": 60_000},
    "model_id": "bench",
    "lookup_timeout_ms": 60_000,
    "load_timeout_ms": 60_000,
    "store_timeout_ms": 60_000,
    "lookup_memo_ms": 60_000,
    "log_interval_s": 0,
}


@dataclass(frozen=True)
class Task:
    """What the worker is to do; crosses to it as JSON."""

    config: dict[str, Any]
    pages: list[int]
    rounds: int


class TimedNative:
    """MemCache's client, with a sum of the seconds spent in its calls."""

    def __init__(self, native: Any) -> None:
        self._native = native
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._native, name)

        @functools.wraps(call)
        def timed(*args: Any) -> Any:
            begin_s = time.perf_counter()
            try:
                return call(*args)
            finally:
                self.seconds += time.perf_counter() - begin_s

        return timed


def _kv_pool(tokens: int) -> Any:
    return MHATokenToKVPool(
        size=tokens,
        page_size=PAGE_TOKENS,
        layer_num=LAYERS,
        head_num=HEADS,
        head_dim=HEAD_DIM,
        dtype=torch.bfloat16,
        device="cpu",
        enable_memory_saver=False,
    )


def tree_of(config: dict[str, Any], pages: int) -> Any:
    """SGLang's radix cache as a scheduler process builds it, with a pool for `pages` pages."""
    load_plugins()
    folder = Path(tempfile.gettempdir()) / "ascend_direct_bench" / "gqa"
    model = str(make_model(folder, "gqa", layers=1, hidden=64))
    options = {**ALLOWED, **config, "memcache": {**ALLOWED["memcache"], **config["memcache"]}}  # type: ignore[dict-item]
    command = ["--model-path", model, "--device", "cpu", "--attention-backend", "torch_native"]
    command += ["--page-size", str(PAGE_TOKENS), names.FLAG, names.CONFIG_FLAG, json.dumps(options)]
    args = prepare_server_args(command)
    args.resolve_once()
    args.check_server_args()
    publish(args, role="scheduler")
    tokens = pages * PAGE_TOKENS
    params = CacheInitParams(
        disable=False,
        req_to_token_pool=ReqToTokenPool(
            size=8, max_context_len=tokens, device="cpu", enable_memory_saver=False
        ),
        token_to_kv_pool_allocator=PagedTokenToKVPoolAllocator(
            tokens, PAGE_TOKENS, torch.bfloat16, "cpu", _kv_pool(tokens), need_sort=False
        ),
        page_size=PAGE_TOKENS,
        tree_core_backend="rust",
    )
    worker = types.SimpleNamespace(
        model_runner=types.SimpleNamespace(forward_stream=None),
        register_hicache_layer_transfer_counter=lambda counter: None,
    )
    return create_tree_cache(
        TreeCacheBuildContext(
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
    )


class Bench:
    """One scheduler thread; `us` has microseconds by what was done."""

    def __init__(self, config: dict[str, Any], most_pages: int) -> None:
        self.tree = tree_of(config, most_pages)
        self.controller = self.tree.direct_controller
        self._allocator = self.tree.token_to_kv_pool_allocator
        store = self.controller.engine._store
        self._native = store._native = TimedNative(store._native)
        self._number = 0
        self._lookup_us = 0.0
        self._lookup = self.controller.lookup
        self.us: dict[str, list[float]] = {}

    def _time(self, name: str, call: Callable[[], Any], *, whole: bool = False) -> Any:
        """Note what `call` keeps this thread for; with `whole`, also with the native calls."""
        self._native.seconds = 0.0
        begin_s = time.perf_counter()
        result = call()
        took_s = time.perf_counter() - begin_s
        own_s = took_s - self._native.seconds
        self.us.setdefault(name, []).append(1e6 * own_s)
        if whole:
            self.us.setdefault(f"{name}, with the pool", []).append(1e6 * took_s)
        return result

    def round(self, pages: int) -> None:
        """One prompt of `pages` pages through everything, none of it known before."""
        tokens = [random.randrange(VOCABULARY) for _ in range(pages * PAGE_TOKENS + 1)]
        hashes = list(
            get_storage_hash_str(RadixKey(array("q", tokens[:-1])), page_size=PAGE_TOKENS)
        )
        self._number += 1
        rid = f"bench-{self._number}"
        asked = [PoolTransfer(name=PoolName.KV, keys=hashes)]
        missed = self._time("lookup, a miss", lambda: self._lookup(f"{rid}-early", asked))
        _demand(missed == [], "a page was found that nobody has stored")
        with self._slots(pages) as slots:
            self._offload(hashes, slots)
        keys = self.controller._keys.keys(hashes)
        self.controller._beliefs.doubt(keys)
        self._hit("lookup, first", rid, asked, whole=True)
        self._hit("lookup, memoised", rid, asked)
        self._hit("lookup, believed", f"{rid}-other", asked)
        self._match(rid, tokens)
        with self._slots(pages) as slots:
            transfer = PoolTransfer(name=PoolName.KV, device_indices=slots, keys=hashes)
            landed = self._time("load", lambda: self.controller.load(rid, [transfer]), whole=True)
            _demand(landed, "a load was refused")
        self._time("idle round", self._idle)
        self.us["idle round"][-1] /= IDLE_ROUNDS
        self._native.remove_batch(keys)

    @contextmanager
    def _slots(self, pages: int) -> Iterator[torch.Tensor]:
        slots = self._allocator.alloc(pages * PAGE_TOKENS)
        _demand(slots is not None, "the KV pool is full")
        try:
            yield slots.to(torch.int64)
        finally:
            self._allocator.free(slots)

    def _offload(self, hashes: list[str], slots: torch.Tensor) -> None:
        transfer = PoolTransfer(name=PoolName.KV, device_indices=slots, keys=hashes)
        begin_s = time.perf_counter()
        queued = self.controller.offload([transfer])
        self.us.setdefault("offload", []).append(1e6 * (time.perf_counter() - begin_s))
        _demand(queued, "an offload was refused")
        while not self.controller.num_completed_offloads():
            _demand(time.perf_counter() - begin_s < STORED_TIMEOUT_S, "a store does not end")
            time.sleep(0.001)
        _demand(self.controller.pop_completed_offload(), "a store failed")

    def _hit(self, name: str, rid: str, asked: list[PoolTransfer], *, whole: bool = False) -> None:
        found = self._time(name, lambda: self._lookup(rid, asked), whole=whole)
        _demand(bool(found) and max(found) == len(asked[0].keys or ()), f"{name}: pages not found")

    def _match(self, rid: str, tokens: list[int]) -> None:
        """What SGLang does in every round with a waiting request, and our part of it."""
        sampling = SamplingParams(temperature=0, max_new_tokens=1)
        sampling.normalize(None)
        req = Req(
            rid=f"{rid}-match",
            origin_input_text="",
            origin_input_ids=array("q", tokens),
            sampling_params=sampling,
            vocab_size=VOCABULARY,
        )
        req.init_next_round_input(self.tree)
        self.controller.lookup = self._spied
        try:
            self._time("match, memoised", lambda: req.init_next_round_input(self.tree))
        finally:
            del self.controller.lookup
        self.us.setdefault("match, memoised, our lookup", []).append(self._lookup_us)
        _demand(req.host_hit_length == len(tokens) - 1, "the match did not find the pages")
        self.tree._forget_hit(req.rid)

    def _spied(self, *args: Any) -> Any:
        begin_s = time.perf_counter()
        result = self._lookup(*args)
        self._lookup_us = 1e6 * (time.perf_counter() - begin_s)
        return result

    def _idle(self) -> None:
        for _ in range(IDLE_ROUNDS):
            self.tree.check_hicache_events()


def _demand(holds: Any, message: str) -> None:
    if not holds:
        raise RuntimeError(message)


def main(arguments: str, out_path: str) -> None:
    """One JSON line per number of pages."""
    task = Task(**json.loads(arguments))
    torch.set_num_threads(1)
    bench = Bench(task.config, max(task.pages))
    with Path(out_path).open("a", encoding="utf-8") as out:
        for pages in task.pages:
            bench.round(pages)  # imports, first touches of memory
            bench.us = {}
            for _ in range(task.rounds):
                bench.round(pages)
            out.write(json.dumps({"kind": "thread", "pages": pages, "us": bench.us}) + "\n")
    bench.tree.release_host_resources()


if __name__ == "__main__":
    worker.run(main)
