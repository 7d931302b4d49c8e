# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""The page store protocol: what `transfer` asks of a pool, and what a provider must keep.

Owns the contract and the registry of providers. Does not own threads, deadlines or retries
(transfer does), or keys (page_key does). docs/store_api.md is the guide for providers.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

from ascend_direct.errors import ConfigError, StoreError
from ascend_direct.page_layout import Addresses, Region

ENTRY_POINT_GROUP = "ascend_direct.stores"
# MemCache's own bound; a key past it fails its whole batch there (facts: 257 bytes → −3000).
MAX_KEY_BYTES = 256


class PageStatus(enum.Enum):
    """What became of one page of a batch. Anything but OK means: the bytes are not usable."""

    OK = "ok"
    MISSING = "missing"  # nobody holds the key
    MISMATCH = "mismatch"  # an object is there, but not of this size, or not the bytes stored
    FULL = "full"  # no room; the page was not stored
    UNAVAILABLE = "unavailable"  # the pool, or the member that holds the page, does not answer
    FAILED = "failed"  # anything else; the store logs the native code


class Memory(enum.Enum):
    """Where the KV pool's bytes are, seen from the store."""

    HOST = "host"
    DEVICE = "device"


@dataclass(frozen=True)
class PageBatch:
    """The memory of some pages: row i of `addresses` belongs to key i of the call.

    Attributes:
        addresses: int64 [pages, spans], start of each span.
        lengths_bytes: bytes of each span, the same for all pages. A page is their concatenation.
    """

    addresses: Addresses
    lengths_bytes: tuple[int, ...]

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        return sum(self.lengths_bytes)

    def __len__(self) -> int:
        return len(self.addresses)


@dataclass(frozen=True)
class StoreContext:
    """What a store learns about its process before it opens.

    Attributes:
        memory: kind of memory the addresses of this process point to.
        device_id: local device number (0 on a CPU).
        rank: rank of this process in its instance; 0 in tools.
        page_bytes: size of a page; 0 in tools that move none.
        regions: memory that pages lie in, for stores that register it.
    """

    memory: Memory = Memory.HOST
    device_id: int = 0
    rank: int = 0
    page_bytes: int = 0
    regions: tuple[Region, ...] = ()


@dataclass(frozen=True)
class StoreStats:
    """A snapshot for logs and tools; None where the store cannot tell."""

    pages: int | None = None
    used_bytes: int | None = None
    capacity_bytes: int | None = None


class PageStore(ABC):
    """A pool of immutable pages, shared by processes.

    Contract, checked by tests/contract/store_contract.py:
      * `put` is first-write-wins: a key that exists keeps its bytes, and the answer is OK.
      * `get` fills a page whole or does not report OK; a page not reported OK may be half written.
      * Batches answer per key, in order; one bad page never changes another's answer. A key that
        is empty or longer than MAX_KEY_BYTES in UTF-8 answers FAILED, alone.
      * Calls may block. They come from several threads at once, never from the scheduler thread.
      * After `close`, `exists`, `get` and `put` raise `StoreUnavailable`, whatever the batch, and
        `stats` still answers. `close` twice is fine.
    """

    name: str

    def problems(self) -> list[str]:
        """Why `open` could not work on this machine, each reason with what to do; [] if it could.

        Called in the launcher before any memory is taken: cheap, and bounded to a few seconds.
        """
        return []

    def unreachable(self) -> str:
        """Why the pool does not answer at this moment, with what to do; "" if it does.

        Apart from `problems`, because a server may be told to start without a pool. Called in the
        launcher: bounded to a few seconds.
        """
        return ""

    @abstractmethod
    def open(self, context: StoreContext) -> None:
        """Connect. Bounded in time.

        Raises:
            ConfigError: the configuration cannot work on this machine.
            StoreUnavailable: the pool does not answer within the configured time.
        """

    @abstractmethod
    def exists(self, keys: Sequence[str]) -> list[PageStatus]:
        """OK or MISSING per key; UNAVAILABLE or FAILED where that is not known.

        Raises:
            StoreUnavailable: the call failed as a whole.
        """

    @abstractmethod
    def get(self, keys: Sequence[str], pages: PageBatch) -> list[PageStatus]:
        """Read each key's page into its spans. Never writes outside them.

        Raises:
            StoreUnavailable: the call failed as a whole; the spans may hold anything.
        """

    @abstractmethod
    def put(self, keys: Sequence[str], pages: PageBatch) -> list[PageStatus]:
        """Store each page under its key. The bytes must not change during the call.

        Raises:
            StoreUnavailable: the call failed as a whole; any of the pages may have been stored.
        """

    def clear(self, prefix: str) -> int | None:
        """Remove the pages whose keys start with `prefix`, "" for all; for tools, not for servers.

        Returns:
            How many were removed; None when the store cannot tell.

        Raises:
            ConfigError: this store cannot do that.
            StoreUnavailable: pages are left.
        """
        raise ConfigError([f"store {self.name!r} cannot remove pages: use its own tools."])

    @abstractmethod
    def stats(self) -> StoreStats:
        """A cheap snapshot; never raises."""

    @abstractmethod
    def close(self) -> None:
        """Release everything. Transfers have ended before."""


def one_each(operation: str, keys: Sequence[str], statuses: list[PageStatus]) -> list[PageStatus]:
    """The statuses, one per key; a key without an answer must not pass for stored.

    Raises:
        StoreError: a store has broken its contract.
    """
    if len(statuses) != len(keys):
        raise StoreError(operation, f"{len(statuses)} answers for {len(keys)} keys")
    return statuses


StoreFactory = Callable[[dict[str, Any]], PageStore]


def provider(name: str) -> StoreFactory:
    """The factory registered under `name` in the entry point group `ascend_direct.stores`.

    A factory takes the provider's own configuration section and validates it.

    Raises:
        ConfigError: no such provider; names those that are installed.
    """
    installed = {entry.name: entry for entry in entry_points(group=ENTRY_POINT_GROUP)}
    if name not in installed:
        known = ", ".join(sorted(installed)) or "none: install ascend_direct with pip"
        raise ConfigError(
            [f"store {name!r} is not installed: install it, or use another ({known})."]
        )
    factory: StoreFactory = installed[name].load()
    return factory
