# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""What each of two ranks does; called by name through `rank_pair`.

Every function runs on both ranks at once and takes (rank, group, folder, ...). SGLang's schedulers
decide alike on all ranks, so nothing here may branch on anything rank-local between two scheduler
actions; what goes wrong in the pool is rank-local on purpose. Results are compared by the tests.
"""

from __future__ import annotations

import random
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from sglang.srt.utils import rank_consensus_checker

from ascend_direct.errors import StoreUnavailable
from ascend_direct.integration.radix_cache import LATE_STORE_ROUNDS
from tests.waiting import eventually

from ..fakes.memory_store import MemoryStore
from .audit import audit, check_all_evictable, drain
from .file_pool import FilePool
from .instance import Instance
from .oracle import Ledger
from .prompts import counts, evict_all, prompt, serve_and_store
from .walk import WALK_CONFIG, Walk

TOKENS = prompt(200)
# Generous: a noisy machine must not make a rank late where the test did not.
CONFIG = {"lookup_timeout_ms": 20_000, "load_timeout_ms": 20_000}


class Ranks:
    """This process's half of some TP=2 instances."""

    def __init__(self, rank: int, group: Any, folder: Path) -> None:
        self.rank = rank
        self.group = group
        names = [tempfile.mkdtemp(prefix="pool-", dir=folder) if rank == 0 else None]
        dist.broadcast_object_list(names, src=0, group=group)
        self.pool = FilePool(Path(str(names[0])))
        self.ledger = Ledger()
        self.made: list[Instance] = []

    def make(self, *, config: dict[str, Any] | None = None, **options: Any) -> Instance:
        """An instance of both ranks."""
        options["config"] = {**CONFIG, **(config or {})}
        self.made.append(Instance(self.pool, self.ledger, group=self.group, **options))
        return self.made[-1]

    def barrier(self) -> None:
        """Both ranks are here."""
        dist.barrier(group=self.group)

    def alike(self, instance: Instance) -> None:
        """Both ranks' trees, free lists and requests are the same."""
        state = fingerprint(instance)
        states: list[Any] = [None, None]
        dist.all_gather_object(states, state, group=self.group)
        for name in state:
            assert states[0][name] == states[1][name], f"{name} differ between ranks: {states}"


def fingerprint(instance: Instance) -> dict[str, Any]:
    """What must not differ between ranks."""
    tree = instance.tree
    return {
        "free pages": instance.allocator.get_all_free_pages().tolist(),
        "tree": sorted(tree.tree_core.all_values_flatten().tolist()),
        "sizes": (tree.evictable_size(), tree.protected_size()),
        "markers": sorted(tree.linker.hit_markers),
        "pending stores": len(tree.linker.pending_offloads),
        "late stores": len(tree.late_stores),
        "withheld": [held.slots.tolist() for held in instance.controller._quarantine],
        "requests": [(s.req.rid, s.phase.name, s.req.prefix_len) for s in instance.requests],
    }


@contextmanager
def ranks(rank: int, group: Any, folder: Path) -> Iterator[Ranks]:
    """Instances that end at rest, alike, with zero leaks, and closed."""
    made = Ranks(rank, group, folder)
    yield made
    for instance in made.made:
        for fault in instance.store.faults.values():
            fault.release()
    made.barrier()
    for instance in made.made:
        check_all_evictable(instance)
        made.alike(instance)
    made.barrier()
    for instance in made.made:
        instance.close()


def pinned(rank: int, group: Any, folder: Path, kind: str) -> int:
    """Pages' worth of bytes that the write-back queue counts for twelve pages that it pins."""
    with ranks(rank, group, folder) as r:
        a = r.make(kind=kind)
        a.store.faults["exists"].hold()
        a.serve(TOKENS)
        held_bytes = a.controller.engine.stores.held_bytes
        a.store.faults["exists"].release()
        drain(a)
        return held_bytes // a.controller.layout.page_bytes


def _stored_by_a(r: Ranks, **options: Any) -> tuple[Instance, Instance]:
    a, b = r.make(**options), r.make(**options)
    serve_and_store(a, TOKENS)
    r.barrier()
    return a, b


def hit(rank: int, group: Any, folder: Path, **options: Any) -> dict[str, int]:
    """B loads what A computed; both ranks say what B got."""
    with ranks(rank, group, folder) as r:
        a, b = _stored_by_a(r, **options)
        served = serve_and_store(b, TOKENS)
        r.alike(b)
        return {
            "objects": len(r.pool),
            "written": a.store.counts["put"].ok_pages,
            "read": b.store.counts["get"].ok_pages,
            "page_bytes": b.controller.layout.page_bytes,
            "read_bytes": b.store.counts["get"].ok_bytes,
            **served.tiers,
        }


def many_hits(rank: int, group: Any, folder: Path, loads: int, **options: Any) -> list[int]:
    """Pages read from the pool by this rank, load by load."""
    with ranks(rank, group, folder) as r:
        _, b = _stored_by_a(r, **options)
        read, before = [], 0
        for _ in range(loads):
            assert serve_and_store(b, TOKENS).tiers["storage"] == 192
            read.append(b.store.counts["get"].ok_pages - before)
            before += read[-1]
            evict_all(b)
        return read


def load_with_fault(
    rank: int, group: Any, folder: Path, what: str, where: int, kind: str
) -> dict[str, Any]:
    """One rank's load goes wrong; afterwards everything works again."""
    with ranks(rank, group, folder) as r:
        late = {"load_timeout_ms": 300} if what == "late" else {}
        _, b = _stored_by_a(r, kind=kind, config=late)
        if rank == where:
            _break_load(b, what)
        first = b.submit(TOKENS)
        b.prefill(first)
        audit(b)
        r.alike(b)
        storage, withheld = first.tiers["storage"], b.controller.quarantined_tokens
        elsewhere = counts(b)["loads_elsewhere"]
        b.abort(first)
        for fault in b.store.faults.values():
            fault.release()
            fault.before = fault.fails_after_keys = None
        r.barrier()
        drain(b)
        r.alike(b)
        evict_all(b)
        b.controller.engine._limits = replace(b.controller.engine._limits, load_timeout_s=20.0)
        again = serve_and_store(b, TOKENS).tiers["storage"]
        return {
            "storage": storage,
            "withheld": withheld,
            "again": again,
            "elsewhere": elsewhere,
        }


def _break_load(instance: Instance, what: str) -> None:
    fault = instance.store.faults["get"]

    def lose(keys: Any) -> None:
        instance.store.pool.drop(keys[-1])

    def crash(keys: Any) -> None:
        raise RuntimeError("a provider with a bug")

    if what == "late":
        fault.hold()
    elif what == "raises":
        fault.fails_after_keys = 2
    elif what == "crashes":
        fault.before = crash
    else:
        fault.before = lose


def fewer_pages(rank: int, group: Any, folder: Path, where: int, how: str, kind: str) -> int:
    """One rank sees fewer pages in the lookup; what both load."""
    with ranks(rank, group, folder) as r:
        config = {"lookup_timeout_ms": 200} if how == "late" else {}
        a, b = _stored_by_a(r, kind=kind, config=config)
        keys = a.keys(a.serve(TOKENS), 192)
        if rank == where:
            if how == "lost":
                r.pool.drop(keys[7])
            elif how == "late":
                b.store.faults["exists"].hold()
            else:
                b.store.faults["exists"].fails_after_keys = 0
        r.barrier()
        served = b.submit(TOKENS)
        b.prefill(served)
        audit(b)
        r.alike(b)
        b.abort(served)
        b.store.faults["exists"].release()
        b.store.faults["exists"].fails_after_keys = None
        return served.tiers["storage"]


def store_with_fault(rank: int, group: Any, folder: Path, what: str, where: int) -> dict[str, int]:
    """One rank's store fails, does not fit or hangs; all ranks unpin alike."""
    with ranks(rank, group, folder) as r:
        a = r.make(config={"store_timeout_ms": 200} if what == "hangs" else {})
        queue = a.controller.engine.stores
        if rank == where:
            if what == "fails":
                a.store.faults["put"].fails_after_keys = 2
            elif what == "full":
                queue._held_bytes = queue._limit_bytes  # others have filled it
            else:
                a.store.faults["put"].hold()
        a.serve(TOKENS)
        r.alike(a)
        if what == "hangs":
            time.sleep(0.3)
            for _ in range(LATE_STORE_ROUNDS):
                a.round()
            audit(a)
            r.alike(a)
            assert a.tree.linker.pending_offloads == []
            assert a.tree.protected_size() == 192
            for fault in a.store.faults.values():
                fault.release()
        drain(a)
        r.alike(a)
        first = counts(a)["store_failed_pages"] + counts(a)["stores_dropped_queue_full"]
        a.store.faults["put"].fails_after_keys = None
        queue._held_bytes = 0
        evict_all(a)
        serve_and_store(a, TOKENS)
        r.barrier()
        b = r.make()
        return {"failed": first, "again": serve_and_store(b, TOKENS).tiers["storage"]}


def attach_one_after_the_other(
    rank: int, group: Any, folder: Path, where: int, kind: str
) -> dict[str, Any]:
    """The pool is away at start; one rank reaches it long before the other does."""
    with ranks(rank, group, folder) as r, pytest.MonkeyPatch.context() as patch:
        patch.setattr("ascend_direct.store.attach.FIRST_PAUSE_S", 0.01)
        a = r.make(kind=kind)
        serve_and_store(a, TOKENS)
        r.barrier()
        reachable = threading.Event()
        opens = MemoryStore.open

        def open_when_reachable(store: MemoryStore, context: Any) -> None:
            if not reachable.is_set():
                raise StoreUnavailable("connect", "nobody listens")
            opens(store, context)

        patch.setattr(MemoryStore, "open", open_when_reachable)
        b = r.make(kind=kind, config={"on_pool_unavailable": "degrade", "write_policy": "off"})
        got = [_storage(r, b)]
        if rank == where:
            _reach(b, reachable)
        r.barrier()
        got.append(_storage(r, b))
        _reach(b, reachable)
        r.barrier()
        return {"got": [*got, _storage(r, b)], "loads": counts(b)["loads"]}


def _reach(instance: Instance, reachable: threading.Event) -> None:
    reachable.set()
    eventually(lambda: instance.controller.engine._store.attached)
    instance.controller.engine._breaker.succeeded()  # or it would take its pause first
    instance.controller.engine._load_breaker.succeeded()


def _storage(r: Ranks, instance: Instance) -> int:
    evict_all(instance)
    served = instance.serve(TOKENS)
    drain(instance)
    r.alike(instance)
    storage: int = served.tiers["storage"]
    return storage


def other_tp_size(
    rank: int, group: Any, folder: Path, kind: str, heads_per_object: int
) -> list[int]:
    """A TP=1 instance loads what TP=2 stored, and the other way round."""
    config = {"heads_per_object": heads_per_object}
    other = prompt(200, seed=1)
    got: list[Any] = []
    with ranks(rank, group, folder) as r:
        two = r.make(kind=kind, config=config)
        serve_and_store(two, TOKENS)
        r.barrier()
        if rank == 0:
            got.append(_alone(r, kind, config, other))
        r.barrier()
        return [*got, serve_and_store(two, other).tiers["storage"]]


def _alone(r: Ranks, kind: str, config: dict[str, Any], other: list[int]) -> int:
    """A TP=1 instance of this process; the other rank has none, so the checker must not compare."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rank_consensus_checker, "assert_same", lambda *_: None)
        one = Instance(r.pool, Ledger(), kind=kind, config={**CONFIG, **config})
        storage = serve_and_store(one, TOKENS, rid="alone-1").tiers["storage"]
        serve_and_store(one, other, rid="alone-2")
        drain(one)
        one.close()
        return storage


def random_walk(
    rank: int, group: Any, folder: Path, kind: str, core: str, steps: int, load_mode: str
) -> dict[str, int]:
    """Both ranks take the same random steps; what goes wrong differs."""
    with ranks(rank, group, folder) as r:
        config = {**WALK_CONFIG, "load_mode": load_mode, "lookahead_percent": 60}
        options = {"kind": kind, "core": core, "tokens": 800, "config": config}
        instances = [r.make(**options) for _ in range(2)]
        walk = Walk(instances, random.Random(f"{kind} {core}"), random.Random(rank))
        for step in range(steps):
            walk.step()
            for instance in instances:
                audit(instance)
                if step % 5 == 0:
                    r.alike(instance)
        walk.finish()
        return {name: sum(counts(i)[name] for i in instances) for name in counts(instances[0])}
