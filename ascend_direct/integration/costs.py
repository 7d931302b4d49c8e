# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""`admission: cost`: what loads and prefills take on this rank, and what is refused for it.

Owns the measuring: a prefill is timed on the forward stream, from where SGLang has built its batch
to the end of its forward, without waiting for it. The rule is `ascend_direct.admission`'s.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

from ascend_direct.admission import NEVER_TOKENS, Admission
from ascend_direct.device import ACCELERATORS, Device
from ascend_direct.transfer import LoadOutcome

logger = logging.getLogger(__name__)


class _StreamClock:
    """Times work on a stream without waiting for it. On a CPU the forward runs inline.

    A moment is where the stream stands now; what it is, is the device's.
    """

    def __init__(self, device: Device, stream: Any) -> None:
        self._stream = stream
        self._module: Any = None
        if device.kind in ACCELERATORS:
            import torch

            self._module = torch.get_device_module(device.kind)

    def moment(self) -> Any:
        if self._module is None:
            return time.perf_counter()
        event = self._module.Event(enable_timing=True)
        event.record(self._stream)
        return event

    def seconds(self, begin: Any, end: Any) -> float | None:
        """Between two moments; None while the stream has not come to `end`."""
        if self._module is None:
            return float(end - begin)
        return float(begin.elapsed_time(end)) / 1e3 if end.query() else None


class _Prefill(NamedTuple):
    tokens: int
    begin: Any
    end: Any


class Costs:
    """Costs of one rank. Used by the scheduler thread alone.

    Args:
        stream: SGLang's forward stream.
        page_size: tokens of a page.
    """

    def __init__(self, device: Device, stream: Any, page_size: int) -> None:
        self._clock = _StreamClock(device, stream)
        self._page_size = page_size
        self._admission = Admission()
        self._begin: Any = None
        self._told_pages = 0
        self._under_way: deque[_Prefill] = deque()

    @property
    def least_tokens(self) -> int:
        """A load pays from here on; 0 while that is not known."""
        return self._admission.least_tokens

    def floor_pages(self, rid: str) -> int:
        """Shorter hits of this request are to be computed. Ranks may differ."""
        return -(-self._admission.floor_tokens(rid) // self._page_size)

    def loaded(self, pages: int, outcome: LoadOutcome) -> None:
        """A load has ended; one that failed says nothing, the breaker counts those."""
        if outcome.landed and outcome.took_s > 0:  # else this rank had no share of the pages
            tokens = pages * self._page_size
            self._tell(self._admission.loaded(tokens, outcome.took_s))

    def prefill_begins(self) -> None:
        """A prefill batch has been built."""
        self._begin = self._clock.moment()

    def forward_launched(self, reqs: Sequence[Any]) -> None:
        """A forward is on its way: that prefill, or one that `prefill_begins` was not told of."""
        begin, self._begin = self._begin, None
        # Requests that decode in the same batch would be taken for prefills of their whole prompt.
        if begin is not None and not any(req.output_ids for req in reqs):
            tokens = sum(req.extend_len for req in reqs)
            self._under_way.append(_Prefill(tokens, begin, self._clock.moment()))
        self._collect()

    def _collect(self) -> None:
        while self._under_way:
            tokens, begin, end = self._under_way[0]
            seconds = self._clock.seconds(begin, end)
            if seconds is None:
                return
            self._under_way.popleft()
            self._tell(self._admission.computed(tokens, seconds))

    def _tell(self, changed: bool) -> None:
        pages = -(-self.least_tokens // self._page_size)
        if not changed or pages == self._told_pages:
            return
        self._told_pages = pages
        fixed_s, load_s = self._admission.loading.fit()
        _, compute_s = self._admission.computing.fit()
        logger.info(
            "ascend_direct: %s (loading %.1f ms + %.2f us per token, computing %.2f us per token)",
            "loads do not pay"
            if self.least_tokens == NEVER_TOKENS
            else f"loads pay from {self.least_tokens} tokens on",
            *(fixed_s * 1e3, load_s * 1e6, compute_s * 1e6),
        )
