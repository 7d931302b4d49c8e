# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Write-back: a bounded queue, one thread, results in the order of submission.

Owns queueing, deadlines of queued jobs and the FIFO of results. Does not own what a job writes:
it calls `write`. A job that has started keeps its pages until its native call returns, however
late; a job that has not is dropped at its deadline, so that the pins of its pages go.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ascend_direct.device import Fence
from ascend_direct.metrics import Metrics

logger = logging.getLogger(__name__)

Pages = npt.NDArray[np.int64]


@dataclass(eq=False)
class StoreJob:
    """Pages of one radix tree node on their way to the pool.

    Attributes:
        keys: store keys, one per page.
        pages: gives the page numbers; called on the store thread, after the fence.
        fence: the pages' bytes are complete once it has passed.
        size_bytes: bytes of all pages, for the queue's bound.
    """

    keys: Sequence[str]
    pages: Callable[[], Pages]
    fence: Fence
    size_bytes: int
    submitted_s: float = 0.0
    started_s: float | None = None
    surrendered: bool = False
    result: bool | None = None
    returned: threading.Event = field(default_factory=threading.Event)


class StoreQueue:
    """FIFO of store jobs.

    Args:
        write: stores a job's pages; True when every page is in the pool. Never raises.
        limit_bytes: bound on the bytes of jobs not yet finished; one job alone may exceed it.
        patience_s: asked now and then: how long a job may be queued, and how long one may run
            before `head_is_late`.
    """

    def __init__(
        self,
        write: Callable[[StoreJob], bool],
        limit_bytes: int,
        patience_s: Callable[[], float],
        metrics: Metrics,
        on_start: Callable[[], None],
    ) -> None:
        self._write = write
        self._limit_bytes = limit_bytes
        self._patience_s = patience_s
        self._metrics = metrics
        self._on_start = on_start
        self._wake = threading.Condition()
        self._waiting: deque[StoreJob] = deque()
        self._unreported: deque[StoreJob] = deque()  # submission order; results leave from the left
        self._running: StoreJob | None = None
        self._held_bytes = 0
        self._stopped = False
        self._thread = threading.Thread(target=self._work, name="ad-store", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, job: StoreJob) -> None:
        """Queue a job. One without pages is done, one for which there is no room or no thread has
        failed, both at once; their results keep their place in line."""
        with self._wake:
            job.submitted_s = time.monotonic()
            self._unreported.append(job)
            if not job.keys:
                self._finish(job, True)
                return
            # Behind a job that was given up there is only waiting, with the pages pinned.
            hung = self._running is not None and self._running.surrendered
            if not hung:
                self._make_room(job.size_bytes)
            full = 0 < self._held_bytes > self._limit_bytes - job.size_bytes
            if self._stopped or hung or full:
                self._finish(job, False)
                self._metrics.add(stores_dropped_queue_full=1)
                return
            self._held_bytes += job.size_bytes
            self._waiting.append(job)
            self._wake.notify()

    def _make_room(self, size_bytes: int) -> None:
        """Drop what has waited longest: what is behind it stays pinned until its turn to be told,
        also where it was refused. A job that cannot fit beside the one that runs makes no room."""
        if size_bytes + (self._running.size_bytes if self._running else 0) > self._limit_bytes:
            return
        while self._waiting and self._held_bytes + size_bytes > self._limit_bytes:
            self._release(self._waiting.popleft())
            self._metrics.add(stores_dropped_queue_full=1)

    def completed(self) -> int:
        """How many results can be popped now."""
        with self._wake:
            self._drop_overdue()
            count = 0
            for job in self._unreported:
                if job.result is None:
                    break
                count += 1
            return count

    def pop(self) -> bool:
        """The oldest result. Only when `completed` said there is one."""
        with self._wake:
            result = self._unreported.popleft().result
            if result is None:
                raise AssertionError("popped the result of a store that has not completed")
            return result

    def head_is_late(self) -> bool:
        """Whether the oldest job has been in its native call for longer than the deadline."""
        with self._wake:
            head = self._unreported[0] if self._unreported else None
            return (
                head is not None
                and head.result is None
                and head.started_s is not None
                and time.monotonic() > head.started_s + self._patience_s()
            )

    def surrender_head(self) -> threading.Event:
        """Report the oldest job as failed before its call has returned.

        Returns:
            Set once the call has returned. Until then the caller must keep the pages from reuse.
        """
        with self._wake:
            head = self._unreported[0]
            if head.result is None:
                head.result, head.surrendered = False, True
                self._metrics.add(stores_late=1)
            return head.returned

    @property
    def held_bytes(self) -> int:
        """Bytes of jobs queued or running."""
        return self._held_bytes

    def quiesce(self, timeout_s: float | None = None) -> bool:
        """Drop what is queued, wait for what runs, forget all results. False: still running."""
        with self._wake:
            while self._waiting:
                self._release(self._waiting.popleft())
            running = self._running
        if running is not None and not running.returned.wait(timeout_s):
            return False
        with self._wake:
            self._unreported.clear()
        return True

    def stop(self) -> None:
        """End the thread after the job that runs; further jobs fail at once."""
        with self._wake:
            self._stopped = True
            self._wake.notify()

    def _drop_overdue(self) -> None:
        oldest_s = time.monotonic() - self._patience_s()
        while self._waiting and self._waiting[0].submitted_s <= oldest_s:
            self._release(self._waiting.popleft())
            self._metrics.add(stores_dropped_deadline=1)

    def _release(self, job: StoreJob) -> None:
        self._held_bytes -= job.size_bytes
        self._finish(job, False)

    def _finish(self, job: StoreJob, result: bool) -> None:
        if not job.surrendered:
            job.result = result
        job.returned.set()

    def _work(self) -> None:
        self._on_start()
        while (job := self._next()) is not None:
            result = False
            try:
                result = self._write(job)
            except Exception:  # a thread root: a lost store costs a recompute, never the server
                logger.exception("storing %d pages failed", len(job.keys))
            with self._wake:
                self._running = None
                self._held_bytes -= job.size_bytes
                self._finish(job, result)

    def _next(self) -> StoreJob | None:
        with self._wake:
            while True:
                self._drop_overdue()
                if self._stopped:
                    return None
                if self._waiting:
                    self._running = self._waiting.popleft()
                    self._running.started_s = time.monotonic()
                    return self._running
                self._wake.wait()
