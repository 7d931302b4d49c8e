# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""One thread that makes blocking calls for a caller who cannot wait for ever.

A native call cannot be interrupted. The caller waits until its deadline and leaves; the call goes
on, and its `Ticket` tells when it has returned. While it has not, further calls are refused at
once, so a pool that hangs costs one deadline and not one per request.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

Result = TypeVar("Result")


class Ticket(Generic[Result]):
    """A call under way.

    Attributes:
        cancelled: set when the caller has left; the call should end at its next safe point.
        returned: the call no longer touches anything.
        began_s, returned_s: when its own work began, which the call tells, and when it returned.
    """

    def __init__(self, call: Callable[[Ticket[Result]], Result]) -> None:
        self._call = call
        # Free once the call has returned. An Event costs several times as much to make and to wake
        # from, in a request that waits for it.
        self._under_way = threading.Lock()
        self._under_way.acquire()
        self._result: Result | None = None
        self._error: BaseException | None = None
        self.cancelled = False
        self.returned = False
        self.began_s: float | None = None
        self.returned_s = 0.0

    def run(self) -> None:
        """Make the call; on the courier's thread."""
        try:
            self._result = self._call(self)
        except BaseException as error:  # noqa: BLE001  a thread root: the caller re-raises it
            self._error = error
        finally:
            self.returned_s = time.monotonic()
            self.returned = True
            self._under_way.release()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Block until the call has returned; False when the time is over first."""
        if self._under_way.acquire(timeout=-1 if timeout_s is None else timeout_s):
            self._under_way.release()  # others may wait too
        return self.returned

    def result(self) -> Result:
        """The call's result, or its exception. Only after it has returned."""
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]


class Courier:
    """Runs calls one at a time on its own daemon thread.

    Args:
        name: thread name, seen in py-spy and in tracebacks.
        on_start: called first on the new thread (binds the device).
    """

    def __init__(self, name: str, on_start: Callable[[], None]) -> None:
        self._on_start = on_start
        self._tickets: queue.SimpleQueue[Ticket[object] | None] = queue.SimpleQueue()
        self._current: Ticket[object] | None = None
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether an earlier call, left by its caller, has not returned yet."""
        return self._current is not None and not self._current.returned

    def call(
        self, work: Callable[[Ticket[Result]], Result], timeout_s: float
    ) -> Ticket[Result] | None:
        """Make a call and wait for it. One caller thread only.

        Returns:
            The ticket: look at `returned` to see whether the deadline came first (`cancelled`
            is then set). None when the courier is busy and nothing was started.
        """
        if self.busy:
            return None
        ticket = self.submit(work)
        if not ticket.wait(timeout_s):
            ticket.cancelled = True
        return ticket

    def submit(self, work: Callable[[Ticket[Result]], Result]) -> Ticket[Result]:
        """Make a call after those before it; for callers who look at the ticket now and then."""
        ticket = Ticket(work)
        self._current = ticket  # type: ignore[assignment]
        self._tickets.put(ticket)  # type: ignore[arg-type]
        return ticket

    def quiesce(self, timeout_s: float | None = None) -> bool:
        """Wait until nothing is under way; False when the time is over first."""
        current = self._current
        return current is None or current.wait(timeout_s)

    def stop(self) -> None:
        """End the thread after the call under way; does not wait for it."""
        self._tickets.put(None)

    def _work(self) -> None:
        self._on_start()
        while (ticket := self._tickets.get()) is not None:
            ticket.run()
