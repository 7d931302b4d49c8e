# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""What KV must hold: bytes of a token's KV as a pure function of everything before it.

Owns the stand-in for a model: `states_of` hashes a token sequence, `Part.kv_bytes` turns states
into bytes of one layer, `next_token` samples. Two instances of one "model" compute the same bytes,
a wrong prefix never does. `Ledger` remembers what each stored object must hold. Knows nothing of
the cache.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

VOCAB_SIZE = 1000
ALL_RANKS = (-1,)  # the "heads" of MLA: one latent, the same on every rank
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15

States = npt.NDArray[np.uint64]
Bytes = npt.NDArray[np.uint8]


def _mix(value: int) -> int:
    """splitmix64's finaliser: one bit of input changes half of the output."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


@cache
def seed_of(*names: object) -> int:
    """A seed from whatever changes KV besides tokens: model, adapter, layer, head."""
    return int.from_bytes(hashlib.sha256(repr(names).encode()).digest()[:8], "little")


def states_of(tokens: Sequence[int], seed: int, before: States | None = None) -> States:
    """State after each token: a chained hash, so that it stands for the whole prefix.

    Args:
        before: states of a leading part already known.
    """
    known = [] if before is None else before.tolist()
    state = known[-1] if known else seed
    for token in tokens[len(known) :]:
        state = _mix((state * 31 + token + _GOLDEN) & _MASK)
        known.append(state)
    return np.array(known, dtype=np.uint64)


def next_token(state: np.uint64) -> int:
    """What the model would sample after this state."""
    return int(state) % VOCAB_SIZE


def _head_bytes(states: States, width: int, seed: int) -> Bytes:
    words = -(-width // 8)
    steps = (np.arange(1, words + 1, dtype=np.uint64) * np.uint64(_GOLDEN))[None, :]
    mixed = (states[:, None] ^ np.uint64(seed)) + steps
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    return mixed.view(np.uint8).reshape(len(states), words * 8)[:, :width]


class Part(NamedTuple):
    """One layer's K, V or latent, of some heads; parts are stored in the order of their fields.

    Attributes:
        heads: numbers among the model's KV heads.
        head_bytes: bytes of one head of one token.
    """

    layer: int
    part: str
    heads: tuple[int, ...]
    head_bytes: int

    def kv_bytes(self, states: States) -> Bytes:
        """Bytes [tokens, heads · head_bytes] that a forward leaves for tokens of these states."""
        blocks = [
            _head_bytes(states, self.head_bytes, seed_of(self.layer, self.part, head))
            for head in self.heads
        ]
        return blocks[0] if len(blocks) == 1 else np.concatenate(blocks, axis=1)


class Ledger:
    """What each key of the shared pool must hold, once somebody may have stored it."""

    def __init__(self) -> None:
        self._objects: dict[str, tuple[tuple[Part, ...], States]] = {}

    def note(self, keys: Sequence[str], parts: Sequence[Part], states: States) -> None:
        """One page, as `len(keys)` objects of neighbouring heads."""
        for index, key in enumerate(keys):
            if key not in self._objects:
                self._objects[key] = (tuple(_share(p, index, len(keys)) for p in parts), states)

    def problems(self, stored: Mapping[str, bytes], *, others: bool = False) -> list[str]:
        """Stored objects that are not what their keys say.

        Args:
            others: whether objects may be there that only other processes know.
        """
        found = []
        for key, data in stored.items():
            if key in self._objects:
                parts, states = self._objects[key]
                if data != b"".join(part.kv_bytes(states).tobytes() for part in parts):
                    found.append(f"{key}: its bytes belong to other tokens")
            elif not others:
                found.append(f"{key}: nobody computed this page")
        return found


def _share(part: Part, index: int, count: int) -> Part:
    step = len(part.heads) // count
    return part._replace(heads=part.heads[index * step : (index + 1) * step])
