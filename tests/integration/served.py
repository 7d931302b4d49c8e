# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""A request of SGLang's, and what the oracle knows of its tokens."""

from __future__ import annotations

from array import array
from enum import Enum, auto

from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.utils import get_storage_hash_str

from .oracle import States, states_of


class Phase(Enum):
    """Where a request is."""

    WAITING = auto()
    CHUNKED = auto()  # some chunks are computed, more to come
    RUNNING = auto()  # decoding
    DONE = auto()


class Served:
    """A request, and what the model knows of it."""

    def __init__(self, req: Req, seed: int) -> None:
        self.req = req
        self.seed = seed
        self.phase = Phase.WAITING
        self.batch: ScheduleBatch | None = None
        self._states = states_of(req.origin_input_ids, seed)
        self._hashes: list[str] = []

    @property
    def tokens(self) -> list[int]:
        return [*self.req.origin_input_ids, *self.req.output_ids]

    @property
    def states(self) -> States:
        """State after each token so far."""
        tokens = self.tokens
        if len(self._states) < len(tokens):
            self._states = states_of(tokens, self.seed, self._states)
        return self._states

    def hashes(self, length: int, page_size: int) -> list[str]:
        """SGLang's page hashes of the first `length` tokens."""
        known = len(self._hashes) * page_size
        if known < length:
            req = self.req
            tokens = array("q", self.tokens[:length])
            key = RadixKey(token_ids=tokens, extra_key=req.extra_key, cache_salt=req.cache_salt)
            last = self._hashes[-1] if known else None
            self._hashes += get_storage_hash_str(key[known:length], last, page_size=page_size)
        return self._hashes[: length // page_size]

    @property
    def tiers(self) -> dict[str, int]:
        """What `cached_tokens_details` will say."""
        req = self.req
        return {
            "device": req.cached_tokens_device,
            "host": req.cached_tokens_host,
            "storage": req.cached_tokens_storage,
        }
