# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""What the plugin did, in numbers: counters, a snapshot, one status line.

Thread-safe. Exporting them (Prometheus, SGLang's collectors) is the integration's work.
"""

from __future__ import annotations

import re
import threading
from dataclasses import asdict, dataclass, field, fields


def _count(text: str) -> int:
    return field(default=0, metadata={"help": text})


@dataclass
class Counts:
    """Totals of this rank since start.

    Pages are counted as this rank moves them: its share of pages that all ranks hold alike, and a
    page in several objects once per object.
    """

    lookups: int = _count("Lookups by the scheduler, of each waiting request in every round.")
    lookups_from_memo: int = _count("Lookups answered from the request's last answer.")
    lookups_timed_out: int = _count("Lookups that the pool did not answer in time.")
    lookups_put_off: int = _count("Lookups not made because the round has asked for long enough.")
    lookup_hit_pages: int = _count("Pages that lookups promised.")
    hits_not_worth: int = _count("Lookups whose hit was not worth a load (admission: cost).")
    loads: int = _count("Loads that landed.")
    load_pages: int = _count("Pages loaded.")
    load_bytes: int = _count("Bytes loaded.")
    load_us: int = _count("Duration of a load that landed, once the running forward had.")
    load_tokens: int = _count("Prompt tokens that loads brought; every rank counts all of them.")
    loads_failed: int = _count("Loads refused because the pool did not deliver a page.")
    loads_missing: int = _count("Those of loads_failed whose pages were only gone from the pool.")
    loads_late: int = _count("Loads given up at their deadline: the pool was slow.")
    loads_fence_late: int = _count("Loads given up before they began: the device was slow.")
    loads_busy: int = _count("Loads not tried because an earlier call has not returned.")
    loads_not_tried: int = _count("Loads not tried because loads are left alone.")
    loads_elsewhere: int = _count("Loads that landed here and were refused for another rank.")
    loads_detached: int = _count("Loads not tried because weights changed at run time.")
    loads_corrupt: int = _count("Loads refused because a page did not match its digest.")
    stores: int = _count("Stores that were written.")
    store_pages: int = _count("Pages stored.")
    store_bytes: int = _count("Bytes stored.")
    store_us: int = _count("Duration of a store.")
    store_skipped_pages: int = _count("Pages that the pool had already.")
    store_failed_pages: int = _count("Pages that the pool did not take.")
    stores_dropped_queue_full: int = _count("Stores dropped because the queue had no room.")
    stores_dropped_deadline: int = _count("Stores dropped because they were queued for too long.")
    stores_late: int = _count("Stores given up while their call was under way.")
    lookahead_given_up: int = _count("Requests that waited for pages in vain, and went on without.")
    breaker_opened: int = _count("Times that the pool was left alone after failures.")


_TROUBLE = re.compile("failed|late$|corrupt|dropped|timed|busy|not_tried|off$|elsewhere|detached")
# Counter → what it counts.
NAMES: dict[str, str] = {each.name: each.metadata["help"] for each in fields(Counts)}
# What has a level and no total → what it is.
LEVELS = {
    "store_queue_bytes": "Bytes of stores that are queued or running.",
    "withheld_tokens": "Device slots that a pool call may still write to.",
    "pool_left_alone": "1 while lookups and stores are not tried, except for probes.",
    "least_load_tokens": "Tokens from which on a load pays (admission: cost); 0: not known.",
    "loads_left_alone": "1 while loads are not tried, except for probes.",
}


class Metrics:
    """Counters that several threads add to."""

    # Whether `show` goes anywhere; asked by those who would compute levels for nothing.
    is_exported = False

    def __init__(self) -> None:
        self._counts = Counts()
        self._lock = threading.Lock()

    def add(self, **amounts: int) -> None:
        """Add to the named counters; an unknown name is an AttributeError."""
        with self._lock:
            for name, amount in amounts.items():
                setattr(self._counts, name, getattr(self._counts, name) + amount)

    def join(self, cache: object) -> None:
        """The cache that these are about, for exporters."""

    def show(self, **levels: int) -> None:
        """Levels of this moment, for exporters."""

    def snapshot(self) -> dict[str, int]:
        """All counters at one moment."""
        with self._lock:
            return asdict(self._counts)

    def status_line(self) -> str:
        """One line for the log: what moved, how fast, what went wrong."""
        now = self.snapshot()
        load_gbps = now["load_bytes"] / max(now["load_us"], 1) / 1e3
        store_gbps = now["store_bytes"] / max(now["store_us"], 1) / 1e3
        troubles = {name: n for name, n in now.items() if n and _TROUBLE.search(name)}
        return (
            f"pool: {now['loads']} loads ({now['load_pages']} pages, {load_gbps:.2f} GB/s), "
            f"{now['stores']} stores ({now['store_pages']} pages, {store_gbps:.2f} GB/s, "
            f"{now['store_skipped_pages']} already there), {now['lookups']} lookups, "
            f"trouble: {troubles or 'none'}"
        )
