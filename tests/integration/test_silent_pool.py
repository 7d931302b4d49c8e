# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""A pool that takes every call and answers none: requests go on, and nothing grows."""

from __future__ import annotations

import threading
import time

from .audit import audit
from .prompts import counts, evict_all, prompt, serve_and_store

LIMITS = {
    "lookup_timeout_ms": 20,
    "load_timeout_ms": 20,
    "store_timeout_ms": 50,
    "store_queue_bytes": 1 << 20,
}
REQUESTS = 120


def test_many_requests_on_a_pool_that_never_answers_leave_nothing_behind(make) -> None:
    # More slots than the queue can pin: else requests wait for its deadline, as they should.
    a, b = make(), make(config=LIMITS, tokens=16384)
    first = serve_and_store(a, prompt(200))
    for fault in b.store.faults.values():
        fault.hold()
    threads = threading.active_count()
    b.serve(prompt(200))  # opens the breaker, hangs a store
    begin_s = time.monotonic()
    for seed in range(REQUESTS):
        served = b.serve(prompt(100, seed=seed % 40 + 1), rid=f"request {seed}")
        assert served.tiers["storage"] == 0
        assert b.controller.engine.stores.held_bytes <= LIMITS["store_queue_bytes"]
        if seed % 20 == 0:
            audit(b)
    took_s = time.monotonic() - begin_s
    # One deadline for each call that was tried, and most requests try none.
    assert took_s / REQUESTS < 0.25
    assert threading.active_count() == threads
    assert len(b.controller._memo) == 0
    assert b.tree.linker.hit_markers == {}
    assert len(b.controller._beliefs) == 0
    assert len(b.controller._suspects) == 0
    assert len(b.tree.late_stores) <= 1
    assert b.controller.quarantined_tokens <= 192, "one late load at most"
    assert b.store.counts["exists"].calls <= 3
    for fault in b.store.faults.values():
        fault.release()
    evict_all(b)
    assert b.serve(prompt(200)).tokens == first.tokens
    assert counts(b)["breaker_opened"] >= 1
