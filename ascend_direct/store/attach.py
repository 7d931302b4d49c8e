# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""A store whose pool may appear later: the option `on_pool_unavailable: degrade`.

Owns trying to open the store, in the background and for as long as it takes. Does not own what an
unreachable pool costs in service: until the store is open every call raises `StoreUnavailable`, so
the breaker opens and requests do not ask. Ranks attach one by one: SGLang intersects their lookups,
so the first load happens after the last of them has.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Sequence

from ascend_direct.errors import ConfigError, StoreUnavailable
from ascend_direct.store.base import PageBatch, PageStatus, PageStore, StoreContext, StoreStats

logger = logging.getLogger(__name__)

# A pool that is there lets a process in within a few seconds; past this the server starts without.
FIRST_WAIT_S = 15.0
# Between attempts, give or take a quarter so that a fleet does not come all at once; doubles.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 15.0
# At close, for an attempt that is about to end. One in a native call may take minutes: left behind.
CLOSE_WAIT_S = 1.0


class AttachingStore(PageStore):
    """Opens another store when its pool can be reached.

    Args:
        store: not open yet.
        first_wait_s: how long `open` waits for the first attempt.
        first_pause_s: pause after it.
    """

    def __init__(
        self,
        store: PageStore,
        first_wait_s: float = FIRST_WAIT_S,
        first_pause_s: float = FIRST_PAUSE_S,
    ) -> None:
        self.name = store.name
        self._store = store
        self._first_wait_s = first_wait_s
        self._pause_s = first_pause_s
        self._tried = threading.Event()
        self._closing = threading.Event()
        self._change = threading.Lock()
        self._attached = False
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None

    @property
    def attached(self) -> bool:
        """Whether the pool has been reached."""
        return self._attached

    def problems(self) -> list[str]:
        return self._store.problems()

    def unreachable(self) -> str:
        return self._store.unreachable()

    def open(self, context: StoreContext) -> None:
        """Start trying; wait a little for the first attempt.

        Raises:
            ConfigError: it said that this machine or configuration cannot work.
        """
        self._thread = threading.Thread(
            target=self._attach, args=(context,), name="ad-attach", daemon=True
        )
        self._thread.start()
        self._tried.wait(self._first_wait_s)
        if isinstance(self._error, ConfigError):
            self._closing.set()
            raise self._error
        if not self._attached:
            reason = self._error or f"no answer within {self._first_wait_s:.0f} s"
            logger.error("starting without the pool, attaching when it appears: %s", reason)

    def exists(self, keys: Sequence[str]) -> list[PageStatus]:
        return self._opened("exists").exists(keys)

    def get(self, keys: Sequence[str], pages: PageBatch) -> list[PageStatus]:
        return self._opened("get").get(keys, pages)

    def put(self, keys: Sequence[str], pages: PageBatch) -> list[PageStatus]:
        return self._opened("put").put(keys, pages)

    def stats(self) -> StoreStats:
        return self._store.stats() if self._attached else StoreStats()

    def close(self) -> None:
        self._closing.set()
        if self._thread is not None:
            self._thread.join(CLOSE_WAIT_S)
        with self._change:
            if self._attached:
                self._store.close()

    def _opened(self, operation: str) -> PageStore:
        if not self._attached:
            raise StoreUnavailable(operation, "the pool has not been reached since the start")
        return self._store

    def _attach(self, context: StoreContext) -> None:
        """Until it succeeds. What fails later than `open` waited is tried again whatever it is:
        a pool may also come back with the settings that fit."""
        begin_s = time.monotonic()
        while not self._closing.is_set():
            try:
                self._store.open(context)
            except Exception as error:  # noqa: BLE001  a thread root; a store may be anybody's code
                self._note(error)
            else:
                self._take(time.monotonic() - begin_s)
                return
            self._closing.wait(self._pause_s * random.uniform(0.75, 1.25))
            self._pause_s = min(self._pause_s * 2, LONGEST_PAUSE_S)

    def _note(self, error: Exception) -> None:
        if self._tried.is_set() and str(error) != str(self._error):
            logger.warning("still without the pool: %s", error)
        self._error = error
        self._tried.set()

    def _take(self, took_s: float) -> None:
        with self._change:
            if self._closing.is_set():
                self._store.close()
                return
            self._attached = True
            self._tried.set()
        logger.info("attached to the pool after %.1f s", took_s)
