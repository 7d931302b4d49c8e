# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""What each return code of the MemCache client means for a page; the only place that knows codes.

Owns the tables and the rate-limited log of what went wrong. The codes are those of MemCache 1.3's
`MmcErrorCode`; a code without an entry is a failed page.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

from ascend_direct.store.base import PageStatus

logger = logging.getLogger(__name__)

LOG_INTERVAL_S = 30.0
# A new member's memory is used up to 2 s before the other members have mapped it: their puts that
# land there are refused until then.
JOIN_RACE = -2


@dataclass(frozen=True)
class Code:
    """What a native return code says about a page.

    Attributes:
        status: of the page.
        meaning: for the log.
        pool_gone: the whole pool is not answering, if every page of a call got such a code.
    """

    status: PageStatus
    meaning: str
    pool_gone: bool = False


# -3000 also means a wrong argument, but arguments are checked before the call; what remains is what
# batches answer while MetaService is away.
CODES: dict[int, Code] = {
    0: Code(PageStatus.OK, "done"),
    -1: Code(PageStatus.FAILED, "general error"),
    -2: Code(PageStatus.UNAVAILABLE, "copy refused: member not linked yet, or wrong memory kind"),
    -3000: Code(PageStatus.UNAVAILABLE, "refused: MetaService is away", True),
    -3001: Code(PageStatus.FAILED, "the client is out of memory"),
    -3002: Code(PageStatus.FAILED, "the client is out of memory"),
    -3003: Code(PageStatus.UNAVAILABLE, "the client is not started", True),
    -3004: Code(PageStatus.UNAVAILABLE, "no answer from MetaService in time", True),
    -3005: Code(PageStatus.FAILED, "called twice"),
    -3006: Code(PageStatus.FAILED, "the object exists"),
    -3007: Code(PageStatus.MISSING, "no such object"),
    -3008: Code(PageStatus.UNAVAILABLE, "the client is not initialised", True),
    -3009: Code(PageStatus.UNAVAILABLE, "request lost in the network layer"),
    -3010: Code(PageStatus.UNAVAILABLE, "request lost in the network layer"),
    -3011: Code(PageStatus.UNAVAILABLE, "request lost in the network layer"),
    -3012: Code(PageStatus.MISMATCH, "the stored object has another size"),
    -3013: Code(PageStatus.FAILED, "past a capacity"),
    -3014: Code(PageStatus.UNAVAILABLE, "no connection to MetaService", True),
    -3015: Code(PageStatus.UNAVAILABLE, "request lost in the network layer"),
    -3016: Code(PageStatus.FAILED, "not enough memory"),
    -3017: Code(PageStatus.UNAVAILABLE, "not connected to MetaService", True),
    -3018: Code(PageStatus.UNAVAILABLE, "not connected to the member that holds the page"),
    -3019: Code(PageStatus.UNAVAILABLE, "the client is closed", True),
    -3020: Code(PageStatus.UNAVAILABLE, "the page is on an SSD that does not answer"),
    -3101: Code(PageStatus.UNAVAILABLE, "the page is being written or removed"),
    -3102: Code(PageStatus.MISSING, "no such key"),
    -3103: Code(PageStatus.FAILED, "MetaService refused the change of state"),
    -3104: Code(PageStatus.UNAVAILABLE, "the page is leased"),
    -3105: Code(PageStatus.UNAVAILABLE, "MetaService could not back the page's entry up"),
    -3106: Code(PageStatus.UNAVAILABLE, "the lease ran out during the call"),
    -3107: Code(PageStatus.FAILED, "the range is written already"),
    -3108: Code(PageStatus.FAILED, "the page is readable already"),
}
# Where a put means something else.
PUT_CODES: dict[int, Code] = CODES | {
    -1: Code(PageStatus.FULL, "no member has room for the page in one piece"),
    -3006: Code(PageStatus.OK, "the page was there"),
    -3013: Code(PageStatus.FULL, "the pool is full"),
    -3016: Code(PageStatus.FULL, "the pool is full"),
}
EXISTS_CODES: dict[int, Code] = CODES | {
    0: Code(PageStatus.MISSING, "no such key"),
    1: Code(PageStatus.OK, "stored"),
}
UNKNOWN = Code(PageStatus.FAILED, "a code this version does not know")

INIT_REFUSED = """\
MetaService answered but would not let this process join. The library's own ERROR lines above say \
more; the usual reasons are
    - memcache.max_dram_size ({config.max_dram_size}) or world_size ({config.world_size}) differs \
from the pool's other members;
    - no rank is free: {config.world_size} processes have joined;
    - the Ascend driver is absent or too old for memcache-hybrid 1.3;
    - {config.protocol} needs huge pages (or MF_HYBM_ENABLE_4K_PAGE=1), or its hcom_url is taken;
    - dram_size ({config.dram_size}) is more than this machine can give"""


class CodeLog:
    """Says what a code means when it first comes up, then at most every LOG_INTERVAL_S."""

    def __init__(self) -> None:
        self._last: dict[tuple[str, int], float] = {}

    def note(self, operation: str, codes: dict[int, Code]) -> None:
        """Log the codes of one call that are neither a hit nor a plain miss."""
        for code, entry in codes.items():
            if entry.status in (PageStatus.OK, PageStatus.MISSING):
                continue
            now = time.monotonic()
            if now - self._last.get((operation, code), -LOG_INTERVAL_S) < LOG_INTERVAL_S:
                continue
            self._last[operation, code] = now
            logger.warning("MemCache %s answered %d: %s", operation, code, entry.meaning)
