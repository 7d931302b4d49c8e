# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""What packing is, in plain torch: the packers are held to this bit by bit. Not for speed."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def pack(memory: torch.Tensor, starts: torch.Tensor, lengths_bytes: Sequence[int]) -> torch.Tensor:
    """Pages as one block each.

    Args:
        memory: uint8 [bytes], all fragments lie in it.
        starts: int64 [pages, fragments], where in `memory` each begins.
        lengths_bytes: bytes of each fragment, the same for all pages.

    Returns:
        uint8 [pages, sum(lengths_bytes)].
    """
    rows = [
        torch.cat([memory[a : a + n] for a, n in zip(row, lengths_bytes, strict=True)])
        for row in starts.tolist()
    ]
    return torch.stack(rows)


def unpack(
    block: torch.Tensor, memory: torch.Tensor, starts: torch.Tensor, lengths_bytes: Sequence[int]
) -> None:
    """The reverse: fill the fragments in `memory` from `block`; nothing beside them changes."""
    for page, row in zip(block, starts.tolist(), strict=True):
        pieces = torch.split(page, list(lengths_bytes))
        for a, n, piece in zip(row, lengths_bytes, pieces, strict=True):
            memory[a : a + n] = piece
