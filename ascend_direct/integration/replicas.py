# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Pages that every attention-TP rank holds alike (MLA): who moves which, and how ranks share them.

Owns the split of a list over ranks, the exchange of read pages on the device, and the choice
between "each reads a share, then they exchange" and "each reads all". Pool traffic is the
controller's business, agreement is ranks'.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

Items = TypeVar("Items", bound=Sequence[Any] | torch.Tensor)

# Loads of each way before the costs are compared, and between looks at the other way after that.
TRIALS = 3
LOOK_AGAIN_AFTER = 64
# Weight of the newest load in a way's mean cost.
FRESHNESS = 0.25


class Shard(NamedTuple):
    """One rank's share: every `size`-th item, from `rank` on."""

    rank: int
    size: int

    def of(self, items: Items) -> Items:
        """This rank's items."""
        return items[self.rank :: self.size]  # type: ignore[return-value]

    def shifted(self, by: int) -> Shard:
        """The share when the first item is number `by` of an endless row, so that rows of few
        items do not all fall to rank 0."""
        return Shard((self.rank - by) % self.size, self.size)

    def prefix(self, held: int, total: int) -> int:
        """How long a prefix of `total` items can be, when this rank's first `held` are there."""
        return min(total, self.rank + held * self.size)


WHOLE = Shard(0, 1)


class Exchange:
    """All-gather of pages among ranks that have read a share each.

    Args:
        views: per span uint8 [pages, bytes of a page's span], on the device.
        group: process group over the device (HCCL, NCCL; gloo on a CPU).
        batch_bytes: bound on the pages of one step; staging takes twice as much.
    """

    def __init__(
        self, views: Sequence[torch.Tensor], group: Any, shard: Shard, batch_bytes: int
    ) -> None:
        self._views = views
        self._group = group
        self._shard = shard
        page_bytes = sum(view.shape[1] for view in views)
        self._step = max(1, batch_bytes // page_bytes // shard.size) * shard.size

    def warm_up(self) -> None:
        """A full step on the padding page; a collective.

        At start, so that memory that is not there and a communicator that cannot be made end the
        start, and not a scheduler in service.
        """
        self.share(torch.zeros(self._step, dtype=torch.int64, device=self._views[0].device), 0)

    def share(self, pages: torch.Tensor, shifted_by: int) -> None:
        """Complete `pages` on every rank; a collective.

        Args:
            pages: int64 [n] page numbers on the device. Each rank has read its share of them.
            shifted_by: how far the shares were shifted.
        """
        for start in range(0, len(pages), self._step):
            self._share(pages[start : start + self._step], shifted_by)

    def _share(self, pages: torch.Tensor, shifted_by: int) -> None:
        shares = [
            Shard(rank, self._shard.size).shifted(shifted_by).of(pages)
            for rank in range(self._shard.size)
        ]
        own = shares[self._shard.rank]
        # Shares differ by one page at most; page 0 is padding and fills up the shorter ones.
        padded = torch.cat([own, own.new_zeros(max(map(len, shares)) - len(own))])
        mine = torch.cat([view[padded] for view in self._views], dim=1)
        received = [torch.empty_like(mine) for _ in shares]
        dist.all_gather(received, mine, group=self._group)
        for rank, (theirs, packed) in enumerate(zip(shares, received, strict=True)):
            if rank == self._shard.rank or not len(theirs):
                continue
            start = 0
            for view in self._views:
                view[theirs] = packed[: len(theirs), start : start + view.shape[1]]
                start += view.shape[1]


class ReadChoice:
    """Whether the next load is read in shares. The same on every rank.

    Args:
        mode: ``auto``, ``sharded`` or ``every_rank``.

    With ``auto`` both ways are tried, then the cheaper one is used and the other looked at now and
    then. Costs become known to all ranks with the verdict of the following load.
    """

    def __init__(self, mode: str) -> None:
        self._mode = mode
        self._cost_us: dict[bool, float] = {}
        self._loads = {True: 0, False: 0}
        self._pending: tuple[bool, int] | None = None
        self._begin_s = 0.0

    def begin(self) -> bool:
        """Start of a load: read it in shares?"""
        self._begin_s = time.monotonic()
        if self._mode != "auto":
            return self._mode == "sharded"
        for way in (True, False):
            if self._loads[way] < TRIALS:
                return way
        cheaper = self._cost_us.get(True, 0.0) <= self._cost_us.get(False, 0.0)
        total = self._loads[True] + self._loads[False]
        return cheaper if total % LOOK_AGAIN_AFTER else not cheaper

    def end(self, sharded: bool, pages: int) -> None:
        """End of a load that landed."""
        self._loads[sharded] += 1
        self._pending = (sharded, int((time.monotonic() - self._begin_s) * 1e6) // max(1, pages))

    @property
    def last_us_per_page(self) -> int:
        """This rank's cost of the last load, to be agreed on."""
        return self._pending[1] if self._pending else 0

    def agreed(self, us_per_page: int) -> None:
        """The ranks' largest cost of the last load."""
        if self._pending is None:
            return
        way, _ = self._pending
        self._pending = None
        if self._loads[way] == 1:  # a first time pays for more than it will again
            return
        before = self._cost_us.get(way, float(us_per_page))
        self._cost_us[way] = before + FRESHNESS * (us_per_page - before)
