# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""The transfer engine: lookups and loads with a deadline, write-back through the store queue.

Knows pages, spans and the store; nothing of SGLang. A pool that fails in any way makes a lookup
unknown, a load refused and a store failed: no exception leaves this file after `start`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ascend_direct.device import Device, Fence
from ascend_direct.errors import StoreError
from ascend_direct.metrics import Metrics
from ascend_direct.page_layout import Addresses, PageLayout
from ascend_direct.store.base import PageBatch, PageStatus, PageStore, one_each
from ascend_direct.transfer.breaker import Breaker
from ascend_direct.transfer.courier import Courier, Result, Ticket
from ascend_direct.transfer.store_queue import Pages, StoreJob, StoreQueue

logger = logging.getLogger(__name__)

# A cold prompt misses its first page, so the first question is short; a warm one pays one more.
FIRST_PROBE_KEYS = 64
PROBE_KEYS = 1024
# Answers to a get after which the next one may well be the same, although `exists` says OK.
_SUSPECT = (PageStatus.MISMATCH, PageStatus.UNAVAILABLE, PageStatus.FAILED)


@dataclass(frozen=True)
class TransferLimits:
    """Bounds, in seconds and bytes; see config.py for their meaning."""

    lookup_timeout_s: float
    load_timeout_s: float
    store_timeout_s: float
    store_queue_bytes: int
    batch_bytes: int


@dataclass(frozen=True)
class LoadOutcome:
    """What became of a load.

    Attributes:
        landed: every byte of every page is in place.
        late: set when a native call is still running and may write to the pages until it returns.
        bad_keys: keys whose pages the pool did not deliver.
        suspect_keys: those of them that are in the pool and cannot be had: of another size,
            damaged, or on a member that does not answer.
        took_s: what the pool needed, from the fence on; 0 for no pages.
    """

    landed: bool
    late: Ticket[list[PageStatus]] | None = None
    bad_keys: tuple[str, ...] = ()
    suspect_keys: tuple[str, ...] = ()
    took_s: float = 0.0

    @property
    def quiet(self) -> bool:
        """Whether no native call can write to the pages any more."""
        return self.late is None or self.late.returned


class TransferEngine:
    """Moves pages between one KV pool and one store.

    Keys name stored objects, of which a page has one, or one per group of heads; where keys and
    pages are given together, the keys go page by page.

    Args:
        store: open already.
        on_stored: called on the store thread with keys now known to be in the pool.
    """

    def __init__(
        self,
        store: PageStore,
        layout: PageLayout,
        device: Device,
        limits: TransferLimits,
        metrics: Metrics,
        on_stored: Callable[[Sequence[str]], None],
    ) -> None:
        self._store = store
        self._layout = layout
        self._device = device
        self._limits = limits
        self._metrics = metrics
        self._on_stored = on_stored
        # Two, since a pool may answer questions well and deliver nothing.
        self._breaker = Breaker()
        self._load_breaker = Breaker()
        self._asking = Courier("ad-lookup", device.bind_thread)
        self._loading = Courier("ad-load", device.bind_thread)
        self.stores = StoreQueue(
            self._write,
            limits.store_queue_bytes,
            self._store_patience_s,
            metrics,
            device.bind_thread,
        )

    def start(self) -> None:
        """Start the threads."""
        self._asking.start()
        self._loading.start()
        self.stores.start()

    @property
    def in_trouble(self) -> bool:
        """Whether the pool has failed to answer lately and is only probed."""
        return self._breaker.is_open

    def _store_patience_s(self) -> float:
        """A pool that does not answer will not take what is queued for it in time, and what is
        queued pins the device memory that requests wait for."""
        store_s = self._limits.store_timeout_s
        return min(store_s, self._limits.load_timeout_s) if self.in_trouble else store_s

    @property
    def loads_in_trouble(self) -> bool:
        """The same of loads."""
        return self._load_breaker.is_open

    @property
    def loads_due(self) -> bool:
        """Whether loads are tried, or it is time to try one again."""
        return self._load_breaker.due(time.monotonic())

    @property
    def may_load(self) -> bool:
        """Whether a load would be tried now; a hit promised otherwise costs device slots only."""
        return not self._loading.busy and self.loads_due

    # ---- lookup ----------------------------------------------------------------------------

    def stored_prefix(self, keys: Sequence[str]) -> int | None:
        """How many leading keys the pool holds; None when it did not answer in time."""
        if not self._breaker.allow(time.monotonic()):
            return None
        ticket = self._asking.call(
            lambda ticket: self._probe(keys, ticket), self._limits.lookup_timeout_s
        )
        if ticket is None or not ticket.returned:
            self.no_answer()
            return None
        return self.told(ticket)

    def no_answer(self) -> None:
        """A question has not returned in time."""
        self._metrics.add(lookups_timed_out=1)
        self._note_failure(self._breaker, "lookup", "no answer in time")

    def ask_ahead(self, keys: Sequence[str]) -> Ticket[int] | None:
        """`stored_prefix` without waiting; `told` has the answer once the ticket has returned.
        None while the pool is left alone."""
        if not self._breaker.allow(time.monotonic()):
            return None
        return self._asking.submit(lambda ticket: self._probe(keys, ticket))

    def told(self, ticket: Ticket[int]) -> int | None:
        """The answer of a question that has returned; None when the pool did not answer."""
        try:
            known = _answer(ticket)
        except StoreError as error:
            self._note_failure(self._breaker, "lookup", str(error))
            return None
        self._breaker.succeeded()
        return known

    def _probe(self, keys: Sequence[str], ticket: Ticket[int]) -> int:
        known, size = 0, FIRST_PROBE_KEYS
        while known < len(keys) and not ticket.cancelled:
            chunk = keys[known : known + size]
            statuses = one_each("exists", chunk, self._store.exists(chunk))
            held = next(
                (i for i, status in enumerate(statuses) if status is not PageStatus.OK), len(chunk)
            )
            known += held
            if held < len(chunk):
                break
            size = PROBE_KEYS
        return known

    # ---- load ------------------------------------------------------------------------------

    def load(self, keys: Sequence[str], pages: Callable[[], Pages], fence: Fence) -> LoadOutcome:
        """Read pages into place and wait, at most until the deadline.

        The fence passes before the first byte is written: a forward that is still running may
        write to pages that were given to this load since it was launched.
        """
        if not self._load_breaker.allow(time.monotonic()):
            self._metrics.add(loads_not_tried=1)
            return LoadOutcome(False)
        ticket = self._loading.call(
            lambda ticket: self._read(keys, pages, fence, ticket), self._limits.load_timeout_s
        )
        if ticket is None or not ticket.returned:
            if ticket is not None and ticket.began_s is None:
                self._metrics.add(loads_fence_late=1)  # it is the forward that is slow
            else:
                self._metrics.add(**{"loads_late" if ticket else "loads_busy": 1})
                self._note_failure(self._load_breaker, "load", f"{len(keys)} pages not in time")
            return LoadOutcome(False, late=ticket)
        return self.outcome(ticket, keys)

    def read_ahead(
        self, keys: Sequence[str], pages: Callable[[], Pages], fence: Fence
    ) -> Ticket[list[PageStatus]] | None:
        """`load` without waiting; `outcome` says what became of it once the ticket has returned.
        None while the pool is left alone."""
        if not self._load_breaker.allow(time.monotonic()):
            self._metrics.add(loads_not_tried=1)
            return None
        return self._loading.submit(lambda ticket: self._read(keys, pages, fence, ticket))

    def gave_up(self, keys: Sequence[str]) -> None:
        """A read ahead has not returned in time."""
        self._metrics.add(loads_late=1)
        self._note_failure(self._load_breaker, "load", f"{len(keys)} pages not in time")

    def outcome(self, ticket: Ticket[list[PageStatus]], keys: Sequence[str]) -> LoadOutcome:
        """What became of a load whose call has returned."""
        try:
            statuses = _answer(ticket)
        except StoreError as error:
            self._metrics.add(loads_failed=1)
            self._note_failure(self._load_breaker, "load", str(error))
            return LoadOutcome(False, bad_keys=tuple(keys))
        if PageStatus.UNAVAILABLE in statuses:
            self._note_failure(self._load_breaker, "load", "holders of pages do not answer")
        elif keys:
            self._load_breaker.succeeded()
        bad = tuple(
            k for k, s in zip(keys, statuses, strict=False) if s is not PageStatus.OK
        ) + tuple(keys[len(statuses) :])
        if bad:
            gone = {s for s in statuses if s is not PageStatus.OK} == {PageStatus.MISSING}
            self._metrics.add(loads_failed=1, loads_missing=int(gone))
            logger.warning("load refused: %d of %d pages not delivered", len(bad), len(keys))
            suspect = (k for k, s in zip(keys, statuses, strict=False) if s in _SUSPECT)
            return LoadOutcome(False, bad_keys=bad, suspect_keys=tuple(suspect))
        took_s = ticket.returned_s - (ticket.began_s or ticket.returned_s)
        self._metrics.add(
            loads=1,
            load_pages=len(keys),
            load_bytes=len(keys) * self._layout.object_bytes,
            load_us=int(took_s * 1e6),
        )
        return LoadOutcome(True, took_s=took_s if keys else 0.0)

    def _read(
        self,
        keys: Sequence[str],
        pages: Callable[[], Pages],
        fence: Fence,
        ticket: Ticket[list[PageStatus]],
    ) -> list[PageStatus]:
        fence.wait()
        ticket.began_s = time.monotonic()
        rows = self._layout.addresses(pages())
        statuses: list[PageStatus] = []
        for part in self._batches(len(keys)):
            if ticket.cancelled:
                break
            got = self._store.get(keys[part], self._batch(rows[part]))
            statuses += got
            if any(status is not PageStatus.OK for status in got):
                break
        return statuses

    # ---- store -----------------------------------------------------------------------------

    def _write(self, job: StoreJob) -> bool:
        """Store a job's pages that the pool does not have yet. On the store thread."""
        if not self._breaker.allow(time.monotonic()):
            self._metrics.add(store_failed_pages=len(job.keys))
            return False
        job.fence.wait()
        rows = self._layout.addresses(job.pages())
        begin = time.monotonic()
        try:
            present = one_each("exists", job.keys, self._store.exists(job.keys))
            todo = [i for i, status in enumerate(present) if status is not PageStatus.OK]
            failed = self._put_all(job, rows, todo)
        except StoreError as error:
            self._metrics.add(store_failed_pages=len(job.keys))
            self._note_failure(self._breaker, "store", str(error))
            return False
        self._breaker.succeeded()
        self._metrics.add(
            stores=1,
            store_pages=len(todo) - len(failed),
            store_bytes=(len(todo) - len(failed)) * self._layout.object_bytes,
            store_us=int((time.monotonic() - begin) * 1e6),
            store_skipped_pages=len(job.keys) - len(todo),
            store_failed_pages=len(failed),
        )
        if failed:
            logger.debug("%d of %d pages were not stored", len(failed), len(todo))
        lost = set(failed)
        self._on_stored([key for i, key in enumerate(job.keys) if i not in lost])
        return not failed

    def _put_all(self, job: StoreJob, rows: Addresses, todo: Sequence[int]) -> list[int]:
        """Put the objects at positions `todo`; returns the positions that were not stored."""
        failed = []
        for part in self._batches(len(todo)):
            chosen = list(todo[part])
            keys = [job.keys[i] for i in chosen]
            statuses = one_each("put", keys, self._store.put(keys, self._batch(rows[chosen])))
            failed += [i for i, s in zip(chosen, statuses, strict=True) if s is not PageStatus.OK]
        return failed

    # ---- both ------------------------------------------------------------------------------

    def _batches(self, count: int) -> Iterator[slice]:
        """Slices of even size: a call for the odd rest would cost as much as a full one."""
        most = max(1, self._limits.batch_bytes // self._layout.object_bytes)
        step = -(-count // -(-count // most)) if count else 1
        for start in range(0, count, step):
            yield slice(start, start + step)

    def _batch(self, rows: Addresses) -> PageBatch:
        return PageBatch(rows, self._layout.lengths_bytes)

    def _note_failure(self, breaker: Breaker, what: str, why: str) -> None:
        if breaker.failed(time.monotonic()):
            self._metrics.add(breaker_opened=1)
            logger.error("the pool is not answering (%s: %s); recomputing until it does", what, why)
        else:
            logger.debug("%s failed: %s", what, why)

    def quiesce(self) -> None:
        """Return when no native call is under way and nothing is queued.

        Not bounded: until the calls have returned they may still touch the pages.
        """
        waited_s = 0
        while not (
            self.stores.quiesce(5.0) and self._loading.quiesce(5.0) and self._asking.quiesce(5.0)
        ):
            waited_s += 5
            logger.warning("waiting for a pool call to return, %d s so far", waited_s)

    def close(self, timeout_s: float = 10.0) -> None:
        """Stop the threads and close the store; gives a hanging call `timeout_s` and leaves it."""
        self.stores.stop()
        for quiet in (self.stores.quiesce, self._loading.quiesce, self._asking.quiesce):
            if not quiet(timeout_s):
                logger.warning("a pool call is still under way; leaving it behind")
                return
        self._loading.stop()
        self._asking.stop()
        self._store.close()


def _answer(ticket: Ticket[Result]) -> Result:
    """A call's result. What a store raises against its contract becomes a StoreError too: on the
    scheduler thread it would end one rank while the others wait for it."""
    try:
        return ticket.result()
    except StoreError:
        raise
    except Exception as error:
        logger.exception("a store broke its contract")
        raise StoreError("store", f"unexpected {type(error).__name__}: {error}") from error
