# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Pages checked against a digest that was stored beside them: the option `verify`.

Owns the digests and what a missing or other one means; a decorator of any store. Beside a page
``K`` lie two small objects, whose *names* say everything, so that no memory for their content is
needed and two servers that store one page at once do not contradict each other:
    K:d            somebody stored digests for K
    K:d{digest}    somebody stored exactly these bytes as K
Both are put before the page. Their content is the first bytes of the page and is never read.

    mode      pages with digests        a page without any
    sample    the same 1 in 16 of all   used
    all       all                       as if it were not there
Servers of every mode share a pool. A pool may evict a digest before its page; the page is then
recomputed, never used wrongly.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from typing import Literal

from ascend_direct.store.base import (
    Memory,
    PageBatch,
    PageStatus,
    PageStore,
    StoreContext,
    StoreStats,
    one_each,
)
from ascend_direct.store.device_copy import DeviceReader
from ascend_direct.store.host_copy import HostSpans

logger = logging.getLogger(__name__)

SAMPLE_ONE_IN = 16
LOG_INTERVAL_S = 30.0
# Content of a digest object: some bytes of the page's first span, 64 as DMA engines like it.
_CONTENT_BYTES = 64
_DIGEST_HEX = 16
# What a digest adds to a key.
SUFFIX_BYTES = len(":d") + _DIGEST_HEX

# Fills a buffer from a page of a batch.
Gather = Callable[[PageBatch, int, bytearray], None]
_OK, _MISSING, _MISMATCH = PageStatus.OK, PageStatus.MISSING, PageStatus.MISMATCH


class VerifiedStore(PageStore):
    """Another store, whose pages are checked after they were read.

    Args:
        store: not open yet.
        mode: which pages have digests and are checked.
        on_corrupt: called once for a `get` in which a page matches none of its digests.
    """

    def __init__(
        self, store: PageStore, mode: Literal["sample", "all"], on_corrupt: Callable[[], None]
    ) -> None:
        self.name = store.name
        self._store = store
        self._all = mode == "all"
        self._on_corrupt = on_corrupt
        self._gather: Gather = _gather_host
        self._logged_s = -LOG_INTERVAL_S

    def problems(self) -> list[str]:
        return self._store.problems()

    def unreachable(self) -> str:
        return self._store.unreachable()

    def open(self, context: StoreContext) -> None:
        if context.memory is Memory.DEVICE:
            self._gather = DeviceReader(context.device_id).gather
        self._store.open(context)

    def stats(self) -> StoreStats:
        return self._store.stats()

    def close(self) -> None:
        self._store.close()

    def exists(self, keys: Sequence[str]) -> list[PageStatus]:
        if not self._all:
            return self._store.exists(keys)
        answers = self._exists([*keys, *map(_marker, keys)])
        pages, markers = answers[: len(keys)], answers[len(keys) :]
        return [
            page if page is not _OK else marker for page, marker in zip(pages, markers, strict=True)
        ]

    # Another's store may break its contract; which digest belongs to which page must stay known.

    def _exists(self, keys: Sequence[str]) -> list[PageStatus]:
        return one_each("exists", keys, self._store.exists(keys))

    def _put(self, keys: Sequence[str], pages: PageBatch) -> list[PageStatus]:
        return one_each("put", keys, self._store.put(keys, pages))

    # ---- put -------------------------------------------------------------------------------

    def put(self, keys: Sequence[str], pages: PageBatch) -> list[PageStatus]:
        rows = self._checked(keys)
        answers = dict(
            zip(rows, self._prepare([keys[row] for row in rows], _some(pages, rows)), strict=True)
        )
        todo = [row for row in range(len(keys)) if answers.get(row, _OK) is _OK]
        stored = self._put([keys[row] for row in todo], _some(pages, todo))
        answers |= dict(zip(todo, stored, strict=True))
        return [answers[row] for row in range(len(keys))]

    def _prepare(self, keys: list[str], pages: PageBatch) -> list[PageStatus]:
        """Store the digests of pages that are not there yet.

        Returns per key: OK when the page may be stored, or is there with its digests.
        """
        if not keys:
            return []
        answers = self._exists(keys)
        new = [row for row, answer in enumerate(answers) if answer is _MISSING]
        there = [row for row, answer in enumerate(answers) if answer is _OK]
        markers = [_marker(keys[row]) for row in new]
        records = self._records(keys, pages, new)
        content = PageBatch(
            _some(pages, new * 2).addresses[:, :1], (min(_CONTENT_BYTES, pages.lengths_bytes[0]),)
        )
        # Marker first: of equally old objects a pool that evicts takes the first stored first.
        put = self._put([*markers, *records], content)
        for i, row in enumerate(new):
            failed = [status for status in (put[i], put[i + len(new)]) if status is not _OK]
            answers[row] = failed[0] if failed else _OK
        if self._all and there:
            marked = self._exists([_marker(keys[row]) for row in there])
            for row, answer in zip(there, marked, strict=True):
                # Another server's page without digests cannot be replaced, nor used by us.
                answers[row] = PageStatus.FAILED if answer is _MISSING else answer
        return answers

    # ---- get -------------------------------------------------------------------------------

    def get(self, keys: Sequence[str], pages: PageBatch) -> list[PageStatus]:
        answers = one_each("get", keys, self._store.get(keys, pages))
        rows = [row for row in self._checked(keys) if answers[row] is _OK]
        if rows:
            found = self._exists(self._records(keys, pages, rows))
            for row, answer in zip(rows, found, strict=True):
                answers[row] = answer
            self._judge(keys, answers, [row for row in rows if answers[row] is _MISSING])
        return answers

    def _judge(self, keys: Sequence[str], answers: list[PageStatus], rows: list[int]) -> None:
        """Answer for pages whose digest is not stored: without any, or with other ones."""
        if not rows:
            return
        corrupt = []
        marked = self._exists([_marker(keys[row]) for row in rows])
        for row, marker in zip(rows, marked, strict=True):
            if marker is _OK:
                answers[row] = _MISMATCH
                corrupt.append(keys[row])
            elif marker is _MISSING:
                answers[row] = _MISSING if self._all else _OK
            else:
                answers[row] = marker
        if corrupt:
            self._on_corrupt()
            self._log(corrupt)

    def _log(self, keys: list[str]) -> None:
        now_s = time.monotonic()
        if now_s - self._logged_s >= LOG_INTERVAL_S:
            self._logged_s = now_s
            logger.error(
                "%d pages read from the pool do not match their digests; not used (first: %s)",
                len(keys),
                keys[0],
            )

    # ---- digests ---------------------------------------------------------------------------

    def _checked(self, keys: Sequence[str]) -> list[int]:
        """Rows that have digests: told by the key, so that writers and readers agree."""
        return [row for row, key in enumerate(keys) if self._all or _in_sample(key)]

    def _records(self, keys: Sequence[str], pages: PageBatch, rows: list[int]) -> list[str]:
        """Names of the objects that say what the pages of `rows` hold now."""
        names, page = [], bytearray(pages.page_bytes)
        for row in rows:
            self._gather(pages, row, page)
            digest = hashlib.sha256(keys[row].encode("utf-8", "surrogatepass") + b"\0")
            digest.update(page)
            names.append(_record(keys[row], digest.hexdigest()[:_DIGEST_HEX]))
        return names


def _gather_host(pages: PageBatch, row: int, target: bytearray) -> None:
    HostSpans(_some(pages, [row])).gather(0, target, 0)


def _some(pages: PageBatch, rows: list[int]) -> PageBatch:
    return PageBatch(pages.addresses[rows], pages.lengths_bytes)


def _in_sample(key: str) -> bool:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[0] % SAMPLE_ONE_IN == 0


def _marker(key: str) -> str:
    return f"{key}:d" if key else key  # a bad key stays one


def _record(key: str, digest: str) -> str:
    return f"{key}:d{digest}" if key else key
