# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""What the plugin did, in numbers: counters, a snapshot, one status line.

Thread-safe. Exporting them (Prometheus, SGLang's collectors) is the integration's work.
"""

from __future__ import annotations

import threading
from dataclasses import asdict, dataclass, fields


@dataclass
class Counts:
    """Totals of this rank since start.

    Pages are counted as this rank moves them: its share of pages that all ranks hold alike, and a
    page in several objects once per object.
    """

    lookups: int = 0
    lookups_from_memo: int = 0
    lookups_timed_out: int = 0
    lookup_hit_pages: int = 0
    loads: int = 0
    load_pages: int = 0
    load_bytes: int = 0
    load_us: int = 0
    loads_failed: int = 0
    loads_late: int = 0
    loads_corrupt: int = 0
    stores: int = 0
    store_pages: int = 0
    store_bytes: int = 0
    store_us: int = 0
    store_skipped_pages: int = 0
    store_failed_pages: int = 0
    stores_dropped_queue_full: int = 0
    stores_dropped_deadline: int = 0
    stores_late: int = 0
    breaker_opened: int = 0


_TROUBLE = ("failed", "late", "corrupt", "dropped", "timed")
NAMES = tuple(field.name for field in fields(Counts))


class Metrics:
    """Counters that several threads add to."""

    def __init__(self) -> None:
        self._counts = Counts()
        self._lock = threading.Lock()

    def add(self, **amounts: int) -> None:
        """Add to the named counters; an unknown name is an AttributeError."""
        with self._lock:
            for name, amount in amounts.items():
                setattr(self._counts, name, getattr(self._counts, name) + amount)

    def snapshot(self) -> dict[str, int]:
        """All counters at one moment."""
        with self._lock:
            return asdict(self._counts)

    def status_line(self) -> str:
        """One line for the log: what moved, how fast, what went wrong."""
        now = self.snapshot()
        load_gbps = now["load_bytes"] / max(now["load_us"], 1) / 1e3
        store_gbps = now["store_bytes"] / max(now["store_us"], 1) / 1e3
        troubles = {
            name: now[name]
            for name in NAMES
            if now[name] and any(word in name for word in _TROUBLE)
        }
        return (
            f"pool: {now['loads']} loads ({now['load_pages']} pages, {load_gbps:.2f} GB/s), "
            f"{now['stores']} stores ({now['store_pages']} pages, {store_gbps:.2f} GB/s, "
            f"{now['store_skipped_pages']} already there), {now['lookups']} lookups, "
            f"trouble: {troubles or 'none'}"
        )
