# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Many requests, some at a time, with a bar; Ctrl-C ends those under way and keeps what is there.

Owns threads, progress and the stop. What a request is and where its result goes is the caller's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from sglang_cpu.client import RequestError, SGLangClient


class Stopped(RuntimeError):
    """The run is ending; raised inside a request so that the server need not finish it."""


class Sender:
    """Runs jobs with a bound on how many are under way.

    Args:
        console: for the bar; None: no bar, and `run` may be called from several threads.
        concurrency: requests at a time.
    """

    def __init__(self, console: Console | None, concurrency: int) -> None:
        self._console = console
        self._concurrency = concurrency
        self._stop = threading.Event()

    def check(self, _ids: list[int] | None = None) -> None:
        """Give it to requests as `on_part`: ends them once the run is being stopped."""
        if self._stop.is_set():
            raise Stopped

    def run(self, title: str, job: Callable[[int], object], numbers: Sequence[int]) -> None:
        """Call `job` with each number. The first error ends the run and is raised."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with (
            Progress(
                *columns, TimeRemainingColumn(), console=self._console or Console(quiet=True)
            ) as progress,
            ThreadPoolExecutor(self._concurrency) as pool,
        ):
            task = progress.add_task(title, total=len(numbers))

            def one(number: int) -> None:
                self.check()
                try:
                    job(number)
                except BaseException:
                    self._stop.set()  # here, before this thread takes the next one
                    raise
                progress.advance(task)

            futures = [pool.submit(one, number) for number in numbers]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                errors = [error for future in done if (error := future.exception())]
                for error in sorted(errors, key=lambda error: isinstance(error, Stopped)):
                    raise error
            except BaseException:
                self._stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def client_at(url: str) -> SGLangClient:
    """A client of the server at ``http://host:port``.

    Raises:
        ValueError: it is no such address.
    """
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname or parts.path not in ("", "/"):
        raise ValueError(f"{url!r} is not of the form http://host:port")
    return SGLangClient(parts.hostname, parts.port or 80)


def failure(error: RequestError) -> str:
    """What goes into the results for a request that the server refused.

    Raises:
        RequestError: the server is not there: going on would only collect such failures.
    """
    if error.status == 0:
        raise error
    return str(error)


def not_done(total: Iterable[int], rows: Iterable[dict[str, Any]], key: str) -> list[int]:
    """Numbers without a good row: those that failed are asked again."""
    done = {row[key] for row in rows if not row.get("error")}
    return [number for number in total if number not in done]
