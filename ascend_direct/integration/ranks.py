# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Agreement among the ranks that must take the same branch.

Owns the reduction over SGLang's attention groups, the same ones its radix cache reduces over.
Called on the scheduler thread only, and only where every rank calls too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist


class RankGroup:
    """The attention ranks of one instance.

    Args:
        attn_cp, attn_tp, tp: SGLang's CPU process groups, None where there is only one rank.
    """

    def __init__(self, attn_cp: Any = None, attn_tp: Any = None, tp: Any = None) -> None:
        wide = [group for group in (attn_cp, attn_tp) if _size(group) > 1]
        self._groups = wide or [group for group in (tp,) if _size(group) > 1]
        # Ranks of the attention-TP group hold different heads of one page, or replicas of it.
        self.size = _size(attn_tp)
        self.rank = dist.get_rank(group=attn_tp) if self.size > 1 else 0

    @classmethod
    def of(cls, params: Any) -> RankGroup:
        """From SGLang's `CacheInitParams`."""
        return cls(params.attn_cp_cache_group, params.attn_tp_cache_group, params.tp_cache_group)

    @property
    def alone(self) -> bool:
        """Whether this is the only rank."""
        return not self._groups

    def smallest(self, values: Sequence[int]) -> list[int]:
        """Element-wise minimum over the ranks; on flags, "true on all ranks"."""
        if not self._groups:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.int64)
        for group in self._groups:
            dist.all_reduce(tensor, op=dist.ReduceOp.MIN, group=group)
        return [int(value) for value in tensor.tolist()]

    def all(self, flag: bool) -> bool:
        """True when the flag is true on every rank."""
        return bool(self.smallest([int(flag)])[0])

    def any(self, flag: bool) -> bool:
        """True when the flag is true on some rank."""
        return not self.all(not flag)


def _size(group: Any) -> int:
    return 1 if group is None else dist.get_world_size(group=group)
