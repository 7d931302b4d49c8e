# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Pages in an Ascend MemCache pool: the only module that imports memcache_hybrid.

Owns joining and leaving the pool, and the batch calls. Does not own deadlines (transfer does), what
return codes mean (memcache_codes), the checks of the machine and the native configuration
(memcache_host), or MetaService's HTTP side (meta_service).

The native library prints about thirty TRACE lines to file descriptor 1 when it joins and as many
when it leaves, at any log level, and ERROR lines when a call fails. They stay: redirecting the
descriptors of a server while its other threads write would lose *their* lines, and a log callback
from Python deadlocks in init. Only `ascend-direct pool member`, which owns its process, moves them.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ascend_direct.config import DirectConfig, MemcacheConfig
from ascend_direct.errors import ConfigError, StoreUnavailable
from ascend_direct.store import memcache_codes, memcache_host
from ascend_direct.store.base import (
    MAX_KEY_BYTES,
    Memory,
    PageBatch,
    PageStatus,
    PageStore,
    StoreContext,
    StoreStats,
)
from ascend_direct.store.memcache_clear import remove_pages
from ascend_direct.store.memcache_codes import JOIN_RACE, UNKNOWN, Code, CodeLog
from ascend_direct.store.meta_service import MetaServiceHttp, require_listening

logger = logging.getLogger(__name__)

# (put, get): memory of this process to the pool and back.
DIRECTIONS = {Memory.HOST: (3, 2), Memory.DEVICE: (0, 1)}
# Leaving takes 2–4 s, 12 s while a lease of a recent get runs, 70 s at worst.
CLOSE_TIMEOUT_S = 15.0
STATS_TIMEOUT_S = 1.0
# Against the join race (memcache_codes): enough for a link that is about to come up.
JOIN_RACE_PAUSES_S = (0.1, 0.3, 0.6)

# The native client exists once per process whatever one constructs: closing one object closes the
# pool under all others. State of the process, hence the one variable of this module that changes.
_only_client = threading.Lock()


def create(section: dict[str, Any]) -> PageStore:
    """The provider `memcache`.

    Raises:
        ConfigError: `section` is not a valid section ``memcache``.
    """
    return MemcacheStore(DirectConfig.load({"memcache": section}, environ={}).memcache)


class MemcacheStore(PageStore):
    """One process's membership in a MemCache pool.

    Side effects: while open, it leaves the pool at interpreter exit too; the native library crashes
    a process that ends without doing so.
    """

    name = "memcache"

    def __init__(self, config: MemcacheConfig) -> None:
        self._config = config
        self._http = (
            MetaServiceHttp(config.metrics_url, STATS_TIMEOUT_S) if config.metrics_url else None
        )
        self._native: Any = None
        self._replicate: Any = None
        self._put_direction, self._get_direction = DIRECTIONS[Memory.HOST]
        self._leaving: threading.Thread | None = None
        self._state = threading.Lock()
        self._log = CodeLog()

    # ---- joining and leaving ----------------------------------------------------------------

    def problems(self) -> list[str]:
        return self._problems_here(self._config) + self._problems_of_pool()

    def unreachable(self) -> str:
        try:
            self._require_listening()
        except StoreUnavailable as error:
            return f"{error}."
        return ""

    def open(self, context: StoreContext) -> None:
        deadline = time.monotonic() + self._config.connect_timeout_ms / 1e3
        config = memcache_host.for_rank(self._config, context.rank)
        reasons = self._problems_here(config)
        if not reasons:
            self._require_listening()
            reasons = self._problems_of_pool()
        if reasons:
            raise ConfigError(reasons)
        memcache_host.warn_about_open_secrets(config.tls)
        library = _import_library()
        self._replicate = library.ReplicateConfig()
        self._replicate.replicaNum = config.replicas
        self._replicate.preferredLocalServiceIDs = [int(m) for m in config.preferred_members]
        self._put_direction, self._get_direction = DIRECTIONS[context.memory]
        with memcache_host.signal_handlers_kept():
            native = library.DistributedObjectStore()
        local = memcache_host.native_config(library, config)
        if not _only_client.acquire(blocking=False):
            raise ConfigError(["this process is in a MemCache pool already; it can join only one."])
        _join(native, local, context.device_id, config, deadline)
        self._native = native
        atexit.register(self.close)
        self._register_regions(context)
        self._wait_linked(deadline)

    def close(self) -> None:
        with self._state:
            native, self._native = self._native, None
            if native is not None:
                atexit.unregister(self.close)
                self._leaving = threading.Thread(
                    target=_leave, args=(native,), name="ad-memcache-close", daemon=True
                )
                self._leaving.start()
        if self._http is not None:
            self._http.close()
        if self._leaving is not None:
            self._leaving.join(CLOSE_TIMEOUT_S)
            if self.is_leaving:
                logger.warning(
                    "still leaving the MemCache pool after %.0f s; going on", CLOSE_TIMEOUT_S
                )

    @property
    def is_leaving(self) -> bool:
        """`close` has returned, but the native library is still at it."""
        return self._leaving is not None and self._leaving.is_alive()

    @property
    def member_id(self) -> int:
        """This process's id in the pool, as `preferred_members` takes it."""
        return int(self._opened("member_id").get_local_service_id())

    def _problems_here(self, config: MemcacheConfig) -> list[str]:
        reasons = memcache_host.problems(config)
        if config.protocol in ("host_tcp", "host_rdma"):
            taken = memcache_host.own_address_problem(config.hcom_url)
            reasons += [taken] if taken else []
        return reasons

    def _require_listening(self) -> None:
        for option in ("meta_service_url", "config_store_url"):
            require_listening(option, getattr(self._config, option))

    def _problems_of_pool(self) -> list[str]:
        # A wrong world_size would be found by the native client after 83 s of retries.
        links = self._http.links() if self._http else None
        own = self._config.world_size
        if links is None or links.world_size in (None, own):
            return []
        return [f"memcache.world_size is {own} but {links.world_size} in the pool: use the pool's."]

    def _register_regions(self, context: StoreContext) -> None:
        if self._config.protocol != "device_rdma":
            return
        for region in context.regions:
            code = self._native.register_buffer(region.address, region.length_bytes)
            if code:
                self.close()
                raise StoreUnavailable(
                    "register_buffer",
                    f"{region.length_bytes} bytes of the KV pool cannot be registered for RDMA: "
                    "check the locked-memory limit (ulimit -l) and the NPU's network port",
                    code,
                )

    def _wait_linked(self, deadline: float) -> None:
        """Wait for the links; pages put on a member that is not linked fail until it is."""
        if self._http is None:
            logger.info("memcache.metrics_url is not set: members may still be linking")
            return
        links = self._http.wait_linked(max(0.0, deadline - time.monotonic()))
        if links is None:
            logger.warning("memcache.metrics_url does not answer: members may still be linking")
        elif not links.complete:
            logger.warning(
                "the pool's members are not all linked after %d ms (%s); pages on those that are "
                "not cannot be used until they are",
                self._config.connect_timeout_ms,
                links,
            )

    # ---- pages ------------------------------------------------------------------------------

    def exists(self, keys: Sequence[str]) -> list[PageStatus]:
        return self._per_key(
            "exists",
            [row for row, key in enumerate(keys) if _is_sendable(key)],
            len(keys),
            memcache_codes.EXISTS_CODES,
            lambda native, rows: native.batch_is_exist([keys[row] for row in rows]),
        )

    def get(self, keys: Sequence[str], pages: PageBatch) -> list[PageStatus]:
        def call(native: Any, rows: list[int]) -> list[int]:
            return list(
                native.batch_get_into_layers(*_arguments(keys, pages, rows), self._get_direction)
            )

        return self._per_key(
            "get", _sendable_rows(keys, pages), len(keys), memcache_codes.CODES, call
        )

    def put(self, keys: Sequence[str], pages: PageBatch) -> list[PageStatus]:
        def call(native: Any, rows: list[int]) -> list[int]:
            return list(
                native.batch_put_from_layers(
                    *_arguments(keys, pages, rows), self._put_direction, self._replicate
                )
            )

        def call_until_linked(native: Any, rows: list[int]) -> list[int]:
            codes = call(native, rows)
            for pause_s in JOIN_RACE_PAUSES_S:
                again = [i for i, code in enumerate(codes) if code == JOIN_RACE]
                if not again:
                    break
                time.sleep(pause_s)
                retried = call(native, [rows[i] for i in again])
                for i, code in zip(again, retried, strict=False):
                    codes[i] = code
            return codes

        rows = _sendable_rows(keys, pages)
        return self._per_key("put", rows, len(keys), memcache_codes.PUT_CODES, call_until_linked)

    def clear(self, prefix: str) -> int | None:
        return remove_pages(self._opened("clear"), self._http, prefix)

    def stats(self) -> StoreStats:
        usage = self._http.usage() if self._http is not None else None
        if usage is None:
            return StoreStats()
        return StoreStats(usage.pages, usage.used_bytes, usage.capacity_bytes)

    def _opened(self, operation: str) -> Any:
        native = self._native
        if native is None:
            raise StoreUnavailable(operation, "the store is not open")
        return native

    def _per_key(
        self,
        operation: str,
        rows: list[int],
        total: int,
        table: dict[int, Code],
        call: Callable[[Any, list[int]], list[int]],
    ) -> list[PageStatus]:
        """Send `rows`, whose keys are sendable, and spread the answers over `total` keys.

        One bad key would fail its whole batch in MemCache, so the others are sent without it.
        """
        native = self._opened(operation)
        statuses = [PageStatus.FAILED] * total
        if not rows:
            return statuses
        codes = call(native, rows)
        if len(codes) != len(rows):  # [] after a close, by this store or behind its back
            raise StoreUnavailable(
                operation, f"{len(codes)} answers for {len(rows)} keys: the client is closed"
            )
        meanings = {code: table.get(code, UNKNOWN) for code in set(codes)}
        self._log.note(operation, meanings)
        if all(meaning.pool_gone for meaning in meanings.values()):
            raise StoreUnavailable(operation, meanings[codes[0]].meaning, codes[0])
        for row, code in zip(rows, codes, strict=True):
            statuses[row] = meanings[code].status
        return statuses


class _Joining:
    """setup and init of a native client on a thread, since init may block for minutes.

    A caller that stops waiting leaves the thread behind: should init succeed after all, the thread
    leaves the pool again. Only then may this process try to join once more.
    """

    def __init__(self, native: Any, local: Any, device_id: int) -> None:
        self.step = "setup"
        self.code: int | None = None
        self._native, self._local, self._device_id = native, local, device_id
        self._lock = threading.Lock()
        self._given_up = False

    def returns_within(self, timeout_s: float) -> bool:
        """Whether both returned in time; `code` is 0, or what `step` answered."""
        thread = threading.Thread(target=self._run, name="ad-memcache-open", daemon=True)
        thread.start()
        thread.join(max(0.0, timeout_s))
        with self._lock:
            self._given_up = self.code is None
            return not self._given_up

    def _run(self) -> None:
        code = -1
        try:
            code = int(self._native.setup(self._local))
            if code == 0:
                self.step = "init"
                code = int(self._native.init(self._device_id, True))
        finally:
            if code != 0:
                _only_client.release()  # before the caller knows: it may try again at once
            with self._lock:
                self.code = code
                unwanted = self._given_up and code == 0
            if unwanted:
                _leave(self._native)


def _join(native: Any, local: Any, device_id: int, config: MemcacheConfig, deadline: float) -> None:
    """Join the pool, or raise; the claim on the one client is given back by whoever ends last."""
    joining = _Joining(native, local, device_id)
    if not joining.returns_within(deadline - time.monotonic()):
        raise StoreUnavailable(
            "init",
            f"the pool at {config.meta_service_url} has not let this process in within "
            f"{config.connect_timeout_ms} ms (memcache.connect_timeout_ms)",
        )
    if joining.code and joining.step == "setup":
        raise ConfigError([f"MemCache refuses the section memcache (code {joining.code})."])
    if joining.code:
        raise StoreUnavailable(
            "init", memcache_codes.INIT_REFUSED.format(config=config), joining.code
        )


def _leave(native: Any) -> None:
    try:
        code = native.close()
        if code:
            logger.warning("MemCache close answered %d", code)
    finally:
        _only_client.release()


def _import_library() -> Any:
    try:
        import memcache_hybrid
    except (ImportError, OSError) as error:  # OSError: a shared library it loads is absent
        raise ConfigError(
            [f"memcache_hybrid cannot be imported ({error}): {memcache_host.INSTALL}."]
        ) from error
    return memcache_hybrid


def _is_sendable(key: str) -> bool:
    try:
        size_bytes = len(key) if key.isascii() else len(key.encode())
    except UnicodeEncodeError:  # a lone surrogate
        return False
    return 0 < size_bytes <= MAX_KEY_BYTES and "\0" not in key


def _sendable_rows(keys: Sequence[str], pages: PageBatch) -> list[int]:
    if len(keys) != len(pages):
        raise ValueError(f"{len(keys)} keys for {len(pages)} pages")
    if not pages.lengths_bytes or min(pages.lengths_bytes) < 1:
        raise ValueError(f"spans of {pages.lengths_bytes} bytes")
    rows = [row for row, key in enumerate(keys) if _is_sendable(key)]
    if not rows or int(pages.addresses.min()) > 0:
        return rows
    mapped = np.all(pages.addresses > 0, axis=1)
    return [row for row in rows if mapped[row]]


def _arguments(
    keys: Sequence[str], pages: PageBatch, rows: list[int]
) -> tuple[list[str], list[list[int]], list[list[int]]]:
    """Keys, addresses and sizes for the native batch calls; all rows share one list of sizes."""
    sizes = list(pages.lengths_bytes)
    addresses = pages.addresses if len(rows) == len(keys) else pages.addresses[rows]
    return [keys[row] for row in rows], addresses.tolist(), [sizes] * len(rows)
