# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Is every slot of an instance accounted for, once? Called after each step of a test.

Owns three views that must agree: SGLang's own invariant checker, who owns each page, and which
locks hold tree pages. `drained` brings an instance to rest and asks for zero leaks.
"""

from __future__ import annotations

import time
from collections import Counter
from types import SimpleNamespace
from typing import Any

from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.managers.scheduler_components.invariant_checker import SchedulerInvariantChecker
from sglang.srt.managers.scheduler_components.pool_stats_observer import (
    SchedulerPoolStatsObserver,
)
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from .instance import Instance
from .served import Phase


def audit(instance: Instance) -> None:
    """Every page has one owner, every lock a holder, and SGLang's checker agrees."""
    checker = _checker(instance)
    checker.self_check_during_busy()
    checker._check_kv_page_invariants()
    _check_owners(instance)
    _check_locks(instance)


def _checker(instance: Instance) -> SchedulerInvariantChecker:
    pools = {
        "tree_cache": instance.tree,
        "token_to_kv_pool_allocator": instance.allocator,
        "req_to_token_pool": instance.rows,
        "is_hybrid_swa": False,
        "is_hybrid_ssm": False,
        "full_tokens_per_layer": None,
        "swa_tokens_per_layer": None,
        "max_total_num_tokens": instance.allocator.size,
    }
    observer = SchedulerPoolStatsObserver(
        session_controller=SimpleNamespace(sessions={}),
        hisparse_coordinator=None,
        enable_hisparse=False,
        **pools,
    )
    batch = SimpleNamespace(reqs=[s.req for s in instance.requests])
    return SchedulerInvariantChecker(
        disaggregation_mode=DisaggregationMode.NULL,
        page_size=instance.page_size,
        pool_stats_observer=observer,
        get_last_batch=lambda: batch,
        get_running_batch=lambda: None,
        scheduler_stage_metrics=None,
        **pools,
    )


def _pages(slots: Any, page_size: int) -> set[int]:
    return {int(slot) // page_size for slot in slots.tolist()}


def _check_owners(instance: Instance) -> None:
    """Free list, tree, requests and quarantine part the pages among them."""
    size, controller = instance.page_size, instance.controller
    owners = {
        "free list": Counter(int(p) for p in instance.allocator.get_all_free_pages().tolist()),
        "tree": Counter(_pages(instance.tree.tree_core.all_values_flatten(), size)),
        "quarantine": Counter(
            page for held in controller._quarantine for page in _pages(held.slots, size)
        ),
    }
    owners["look-ahead"] = Counter(
        page
        for one in _ahead(instance)
        if one.reading is not None
        for page in _pages(one.reading.slots, size)
    )
    for served in instance.requests:
        kv = served.req.kv
        if kv.holds_kv:
            row = instance.rows.req_to_token[kv.req_pool_idx]
            private = row[kv.cache_protected_len : kv.kv_allocated_len]
            owners[f"request {served.req.rid}"] = Counter(_pages(private, size))
    total = sum(owners.values(), Counter())
    several = {p: [o for o, has in owners.items() if p in has] for p, n in total.items() if n > 1}
    assert not several, f"pages with several owners: {several}"
    lost = set(range(1, instance.allocator.num_pages + 1)) - set(total)
    assert not lost, f"pages without an owner: {sorted(lost)}"
    withheld = owners["quarantine"].total() + owners["look-ahead"].total()
    assert controller.quarantined_tokens == withheld * size


def _ahead(instance: Instance) -> list[Any]:
    """What look-ahead has under way."""
    ahead = instance.look_ahead
    return [] if ahead is None else [*ahead._ahead.values(), *ahead._left]


def _check_locks(instance: Instance) -> None:
    """The protected part of the tree is what requests, stores and late stores lock."""
    tree, size = instance.tree, instance.page_size
    nodes = [p.lock_node_id for p in tree.linker.pending_offloads]
    nodes += [late.node_id for late in tree.late_stores]
    nodes += [one.node_id for one in _ahead(instance)]
    nodes += [s.req.lock.node for s in instance.requests if s.req.lock is not None]
    locked: set[int] = set()
    for node in nodes:
        locked |= _pages(tree.path_device_indices(node), size)
    protected = UnifiedRadixCache.protected_size(tree)
    assert protected == len(locked) * size, f"{protected} protected, {len(locked) * size} locked"
    queued = len(instance.controller.engine.stores._unreported)
    assert queued == len(tree.linker.pending_offloads)


def drain(instance: Instance, timeout_s: float = 20.0) -> None:
    """Scheduler rounds until nothing is under way."""
    deadline_s = time.monotonic() + timeout_s
    tree = instance.tree
    while True:
        instance.round()
        pending = (
            len(tree.linker.pending_offloads),
            len(tree.late_stores),
            instance.controller.quarantined_tokens + len(_ahead(instance)),
        )
        if not any(pending):
            return
        assert time.monotonic() < deadline_s, f"stores, late stores, withheld slots: {pending}"
        time.sleep(0.001)


def check_pool(instance: Instance) -> None:
    """Every page in the shared pool holds the tokens its key stands for."""
    pool = instance.store.pool
    found = ((key, pool.read(key)) for key in pool.keys())  # noqa: SIM118  not a mapping
    stored = {key: data for key, data in found if data is not None}
    assert instance.ledger.problems(stored, others=instance.group is not None) == []


def check_at_rest(instance: Instance) -> None:
    """Drained, with no request left: no pin, no withheld slot, no leaked slot, no stale record."""
    drain(instance)
    audit(instance)
    tree = instance.tree
    assert all(s.phase is Phase.WAITING for s in instance.requests)
    assert UnifiedRadixCache.protected_size(tree) == 0
    assert tree.linker.inflight_load_rids == []
    assert tree.linker.private_load_indices == {}
    waiting = {s.req.rid for s in instance.requests}
    assert set(tree.linker.hit_markers) <= waiting, "hit markers of requests that are gone"
    assert len(instance.rows.free_slots) == instance.rows.size
    assert instance.controller.engine.stores.held_bytes == 0
    check_pool(instance)


def check_all_evictable(instance: Instance) -> None:
    """At rest, evicting everything leaves every slot free."""
    check_at_rest(instance)
    instance.tree.evict(EvictParams(num_tokens=instance.allocator.size))
    assert instance.allocator.available_size() == instance.allocator.size
