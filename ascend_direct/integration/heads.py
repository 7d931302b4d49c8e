# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Which KV heads a rank holds, and pages stored by groups of heads.

Keys of GQA pages carry the range of heads, not the rank, so that servers of one model with other
TP sizes find each other's pages wherever their objects hold the same heads.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

from ascend_direct.errors import LayoutError
from ascend_direct.page_key import head_part
from ascend_direct.page_layout import PageLayout, by_heads

logger = logging.getLogger(__name__)


class HeadRange(NamedTuple):
    """KV heads of one rank.

    Attributes:
        first: number of the first, of all heads of the model; None where it cannot be told, and
            pages are shared between equal TP sizes only.
        held: heads in this rank's pool.
        total: heads of the model.
    """

    first: int | None
    held: int
    total: int

    @classmethod
    def of_rank(
        cls, count: int, total: int, rank: int, size: int, *, padded: bool = False
    ) -> HeadRange:
        """As SGLang deals heads: in order, or one head to several ranks where there are fewer.

        Args:
            padded: on a CPU SGLang pads the heads instead, with ranges that cannot be told here.
        """
        if count * size == total:
            return cls(rank * count, count, total)
        if count == 1 and size % total == 0 and not padded:
            return cls(rank * total // size, 1, total)
        logger.warning(
            "%d KV heads on each of %d ranks do not make up the model's %d: pages are shared "
            "between servers of this TP size only",
            count,
            size,
            total,
        )
        return cls(None, count, total)

    def parts(self, objects: int) -> list[str]:
        """Rank parts of the keys of a page's objects."""
        if self.first is None:
            raise AssertionError("no head range is known")
        step = self.held // objects
        starts = range(self.first, self.first + self.held, step)
        return [head_part(start, start + step - 1) for start in starts]


def stored_by_heads(layout: PageLayout, heads: HeadRange, heads_per_object: int) -> PageLayout:
    """The layout with one object per `heads_per_object` heads; 0 = one object of all heads.

    Heads that cannot be cut that way are stored whole, which the log says: pages are then shared
    between servers that hold the same heads per rank only.
    """
    step = heads_per_object or heads.held
    fields = tuple((name, step if name == "head_num" else value) for name, value in layout.fields)
    if step == heads.held or heads.first is None:
        return layout
    try:
        return by_heads(layout, heads.held, step, fields)
    except LayoutError as error:
        logger.warning(
            "heads_per_object=%d: %s; pages are stored with all %d heads of a rank and shared "
            "between servers of this TP size only",
            step,
            error,
            heads.held,
        )
        return layout
