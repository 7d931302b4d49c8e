# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Pages that cross the wire in one piece each: the option `transfer`.

Owns when pages are packed, and the blocks they are packed in; a decorator of any store. A page of a
real model is some hundred fragments; each is an operation for the pool. Packed, it is one, for one
more copy on the device. In the pool the bytes are the same, so servers of either kind share pages.

`auto` reads a few pages of this layout both ways when the pool is open, and keeps what was faster.
They are zeros under keys that all servers of one page size share (`ad1:transfer:…`), at most
PROBE_BYTES in a pool, and go by its eviction. Host memory is not measured and scattered: the pool
copies it in one pass, to which packing would add another.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from ascend_direct.config import MIB
from ascend_direct.device import Device
from ascend_direct.errors import ConfigError, StoreError
from ascend_direct.page_layout import PageLayout
from ascend_direct.store.base import (
    Memory,
    PageBatch,
    PageStatus,
    PageStore,
    StoreContext,
    StoreStats,
    one_each,
)
from ascend_direct.store.page_packer import Block, HostBlock

logger = logging.getLogger(__name__)

# One for loads and one for stores, which may run at once; further calls wait for one.
BLOCKS = 2
# A2 needs 16 MB in a call for 80 % of its bandwidth.
BLOCK_BYTES = 32 * MIB
PROBE_BYTES = 16 * MIB
PROBE_PAGES = 8
PROBE_ROUNDS = 9
# No further round is begun after the first; an unfinished one is given up after the second.
PROBE_S, PROBE_LIMIT_S = 0.3, 2.0
# At close, for a measurement that was given up; one that hangs is left behind, the store open.
PROBE_CLOSE_S = 10.0
# Packing must save at least this much to be worth its memory traffic.
PACKED_GAIN = 1.05

MakeBlock = Callable[[int], Block]


class PackedStore(PageStore):
    """Another store, whose pages are packed first and unpacked after.

    Args:
        store: not open yet.
        mode: whether to pack, or to measure that.
        make_block: makes a block of so many bytes in the memory that the pages are in.
        lengths_bytes: the fragments of an object, to try the blocks out and to measure.
        block_bytes: of each block; a batch that does not fit is moved in several calls.
        bind_thread: makes the device current for the thread that measures.
    """

    def __init__(
        self,
        store: PageStore,
        mode: Literal["auto", "packed"],
        make_block: MakeBlock,
        lengths_bytes: Sequence[int],
        block_bytes: int = BLOCK_BYTES,
        bind_thread: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = store.name
        self._store = store
        self._mode = mode
        self._make_block = make_block
        self._lengths_bytes = tuple(lengths_bytes)
        self._bind_thread = bind_thread
        self._block_bytes = max(block_bytes, sum(lengths_bytes))
        # Kept also where they are not used: the pool may have registered their memory.
        self._made: list[Block] = []
        self._blocks: queue.SimpleQueue[Block] = queue.SimpleQueue()
        self._packs = False
        self._probe: threading.Thread | None = None

    @property
    def packs(self) -> bool:
        """Whether pages are packed; known once the store is open."""
        return self._packs

    def problems(self) -> list[str]:
        return self._store.problems()

    def unreachable(self) -> str:
        return self._store.unreachable()

    def open(self, context: StoreContext) -> None:
        wanted = self._mode == "packed" or context.memory is Memory.DEVICE
        if wanted and len(self._lengths_bytes) > 1 and not self._made:
            self._made = self._new_blocks()
        regions = (*context.regions, *(block.region for block in self._made))
        self._store.open(replace(context, regions=regions))
        self._packs = bool(self._made) and (self._mode == "packed" or self._is_faster())
        if self._packs:
            for block in self._made:
                self._blocks.put(block)

    def _new_blocks(self) -> list[Block]:
        """Blocks that have packed and unpacked once: a kernel is compiled at its first launch,
        which may fail, and takes longer than a load may."""
        try:
            blocks = [self._make_block(self._block_bytes) for _ in range(BLOCKS)]
            pages = self._probe_pages(blocks[0])
            blocks[1].pack(pages)
            blocks[1].unpack(pages, range(len(pages)))
        except Exception as error:  # a compiler may raise anything
            failure = error if isinstance(error, ConfigError) else _refusal(error)
            if self._mode == "packed":
                raise failure from error
            logger.warning("transfer auto: scatter, %s", "; ".join(failure.reasons))
            return []
        return blocks

    def exists(self, keys: Sequence[str]) -> list[PageStatus]:
        return self._store.exists(keys)

    def clear(self, prefix: str) -> int | None:
        return self._store.clear(prefix)

    def stats(self) -> StoreStats:
        return self._store.stats()

    def close(self) -> None:
        if self._probe is not None:
            self._probe.join(PROBE_CLOSE_S)
            if self._probe.is_alive():
                logger.warning("a pool call is still under way; leaving it behind")
                return
        self._store.close()

    # ---- pages -----------------------------------------------------------------------------

    def put(self, keys: Sequence[str], pages: PageBatch) -> list[PageStatus]:
        if not self._worth_packing(keys, pages):
            return self._store.put(keys, pages)
        answers: list[PageStatus] = []
        for part in self._parts(pages):
            some = PageBatch(pages.addresses[part], pages.lengths_bytes)
            with self._block() as block:
                block.pack(some)
                answers += one_each(
                    "put", keys[part], self._store.put(keys[part], _packed(block, some))
                )
        return answers

    def get(self, keys: Sequence[str], pages: PageBatch) -> list[PageStatus]:
        if not self._worth_packing(keys, pages):
            return self._store.get(keys, pages)
        answers: list[PageStatus] = []
        for part in self._parts(pages):
            some = PageBatch(pages.addresses[part], pages.lengths_bytes)
            with self._block() as block:
                answers += self._get(block, keys[part], some)
        return answers

    def _get(self, block: Block, keys: Sequence[str], pages: PageBatch) -> list[PageStatus]:
        answers = one_each("get", keys, self._store.get(keys, _packed(block, pages)))
        rows = [row for row, answer in enumerate(answers) if answer is PageStatus.OK]
        if rows:
            block.unpack(pages, rows)
        return answers

    def _worth_packing(self, keys: Sequence[str], pages: PageBatch) -> bool:
        """Batches that cannot be packed are left to the store, mistakes included."""
        return (
            self._packs
            and len(pages.lengths_bytes) > 1
            and 0 < len(keys) == len(pages)
            and min(pages.lengths_bytes) > 0
            and pages.page_bytes <= self._block_bytes
            and int(pages.addresses.min()) > 0
        )

    def _parts(self, pages: PageBatch) -> Iterator[slice]:
        step = self._block_bytes // pages.page_bytes
        for start in range(0, len(pages), step):
            yield slice(start, start + step)

    @contextlib.contextmanager
    def _block(self) -> Iterator[Block]:
        block = self._blocks.get()
        try:
            yield block
        finally:
            self._blocks.put(block)

    # ---- the measurement -------------------------------------------------------------------

    def _is_faster(self) -> bool:
        """Whether packed reads beat scattered ones; False if the pool does not say in time."""
        times: dict[str, float] = {}
        failure: list[str] = []

        def measure() -> None:
            try:
                self._bind_thread()
                times.update(self._measure(*self._made))
            except Exception as error:  # noqa: BLE001  a thread root; a store may be anybody's code
                failure.append(str(error))

        self._probe = threading.Thread(target=measure, name="ad-transfer-probe", daemon=True)
        self._probe.start()
        self._probe.join(PROBE_LIMIT_S)
        if not times:
            reason = failure[0] if failure else f"no answer within {PROBE_LIMIT_S:.0f} s"
            logger.warning("transfer auto: scatter, the pool could not be measured: %s", reason)
            return False
        faster = times["scatter"] > PACKED_GAIN * times["packed"]
        logger.info(
            "transfer auto: %s (%.2f ms scattered, %.2f ms packed, for pages of %d fragments)",
            "packed" if faster else "scatter",
            times["scatter"] * 1e3,
            times["packed"] * 1e3,
            len(self._lengths_bytes),
        )
        return faster

    def _measure(self, scattered: Block, packed: Block) -> dict[str, float]:
        """Seconds of one read each way: medians over rounds, the ways in turns.

        Raises:
            StoreError: the pool does not store or deliver.
        """
        pages = self._probe_pages(scattered)
        keys = [f"ad1:transfer:-:{pages.page_bytes}-{row}" for row in range(len(pages))]
        packed.pack(pages)  # nothing in the pool but zeros
        _all_ok("put", self._store.put(keys, _packed(packed, pages)))
        ways: dict[str, Callable[[], list[PageStatus]]] = {
            "scatter": lambda: self._store.get(keys, pages),
            "packed": lambda: self._get(packed, keys, pages),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        begin_s = time.perf_counter()
        for _ in range(1 + PROBE_ROUNDS):
            for name, way in ways.items():
                start_s = time.perf_counter()
                _all_ok("get", way())
                seconds[name].append(time.perf_counter() - start_s)
            if time.perf_counter() - begin_s > PROBE_S:
                break
        # The first round opens connections.
        return {name: statistics.median(took[1:] or took) for name, took in seconds.items()}

    def _probe_pages(self, block: Block) -> PageBatch:
        """Pages whose fragments lie in `block` as in a KV pool: layer by layer."""
        lengths = np.array(self._lengths_bytes)
        page_bytes = int(lengths.sum())
        room = min(PROBE_BYTES, block.region.length_bytes) // page_bytes
        count = max(1, min(PROBE_PAGES, room))
        bases = block.region.address + count * (np.cumsum(lengths) - lengths)
        rows = bases[None, :] + np.arange(count)[:, None] * lengths[None, :]
        return PageBatch(rows.astype(np.int64), self._lengths_bytes)


def _packed(block: Block, pages: PageBatch) -> PageBatch:
    """The pages' places in the block, in order."""
    starts = block.region.address + np.arange(len(pages), dtype=np.int64) * pages.page_bytes
    return PageBatch(starts[:, None], (pages.page_bytes,))


def _all_ok(operation: str, answers: list[PageStatus]) -> None:
    bad = [answer for answer in answers if answer is not PageStatus.OK]
    if bad or not answers:
        raise StoreError(operation, f"a measured page is {bad[0].value if bad else 'lost'}")


def _refusal(error: Exception) -> ConfigError:
    return ConfigError([f"pages cannot be packed here ({error!r}): set transfer to scatter."])


def with_transfer(
    store: PageStore,
    mode: Literal["auto", "scatter", "packed"],
    layout: PageLayout,
    device: Device,
) -> PageStore:
    """`store`, or one that packs its pages, which are on `device`."""
    if mode == "scatter":
        return store

    def make_block(size_bytes: int) -> Block:
        if device.kind == "cpu":
            return HostBlock(size_bytes)
        from ascend_direct.store.device_page_packer import Accelerator, DeviceBlock

        return DeviceBlock(size_bytes, Accelerator(device.kind, device.index))

    lengths_bytes = layout.lengths_bytes
    return PackedStore(store, mode, make_block, lengths_bytes, bind_thread=device.bind_thread)
