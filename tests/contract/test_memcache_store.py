# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""MemcacheStore on the unmodified memcache_hybrid wheel: real MetaService, real members.

Every fault here is provoked, none is played: the return codes are the library's own. Codes that no
test can provoke are held by tests/unit/test_memcache_codes.py.
"""

from __future__ import annotations

import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ascend_direct.errors import ConfigError, StoreUnavailable
from ascend_direct.store.base import Memory, PageBatch, PageStatus, PageStore, StoreContext
from tests.contract.conftest import COMMON, NewStore, Pool
from tests.contract.memcache_processes import (
    FixedMetaService,
    PoolMember,
    SharedArena,
    StoreProcess,
)
from tests.contract.store_contract import Arena, StoreContract, StoreFactory, new_keys

import ascend_emulation  # isort: skip
import memcache_pool  # isort: skip

pytestmark = [
    pytest.mark.memcache,
    pytest.mark.multi,
    pytest.mark.skipif(
        ascend_emulation.real_driver_present() is not None,
        reason="the emulation refuses to start where an Ascend driver is present",
    ),
]

OK, MISSING, FULL = PageStatus.OK, PageStatus.MISSING, PageStatus.FULL
UNAVAILABLE, FAILED = PageStatus.UNAVAILABLE, PageStatus.FAILED
MIB = 1 << 20
LENGTHS = (96, 64)


@pytest.fixture(scope="module")
def module_arena(pool: Pool) -> SharedArena:
    return pool.arena()


@pytest.fixture(scope="module")
def module_store(pool: Pool, module_arena: SharedArena) -> Iterator[StoreProcess]:
    """A pure client that all tests share which leave it as it was: joining takes two seconds."""
    process = pool.process(module_arena)
    process.open(StoreContext())
    yield process
    process.kill()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(11)


class TestMemcacheStore(StoreContract):
    @pytest.fixture
    def arena(self, module_arena: SharedArena) -> Arena:
        return module_arena

    @pytest.fixture
    def store(self, module_store: StoreProcess) -> PageStore:
        return module_store

    @pytest.fixture
    def store_factory(self, new_store: NewStore, module_arena: SharedArena) -> StoreFactory:
        def make(context: StoreContext) -> PageStore:
            return new_store(module_arena, context)

        return make


# --- who holds the pages


def test_pages_put_by_a_pure_client_outlive_it_on_the_member(
    pool: Pool, new_store: NewStore, module_store: StoreProcess, rng: np.random.Generator
) -> None:
    arena, keys = pool.arena(), new_keys(2)
    pages = arena.place(2, LENGTHS, rng)
    arena.scramble(rng)
    expected = [arena.read(pages, row) for row in range(2)]
    closed, killed = new_store(arena), new_store(arena)
    assert closed.put(keys[:1], PageBatch(pages.addresses[:1], LENGTHS)) == [OK]
    assert killed.put(keys[1:], PageBatch(pages.addresses[1:], LENGTHS)) == [OK]
    closed.close()
    killed.kill()

    reader = new_store(arena)
    arena.bytes[:] = 0
    assert reader.exists(keys) == [OK, OK]
    assert reader.get(keys, pages) == [OK, OK]
    assert [arena.read(pages, row) for row in range(2)] == expected


def test_stats_come_from_the_metrics_url(pool: Pool, module_store: StoreProcess) -> None:
    stats = module_store.stats()
    assert stats.capacity_bytes is not None
    assert stats.capacity_bytes >= 128 * MIB
    assert stats.pages == len(pool.meta.keys())


# --- return codes, provoked


def test_the_wrong_kind_of_memory_is_unavailable_after_a_few_tries(
    pool: Pool, new_store: NewStore, module_store: StoreProcess, rng: np.random.Generator
) -> None:
    """-2 is what the join race answers too, hence the tries."""
    arena, keys = pool.arena(), new_keys(2)
    store = new_store(arena, StoreContext(memory=Memory.DEVICE))
    pages = arena.place(2, LENGTHS, rng)
    started = time.monotonic()
    assert store.put(keys, pages) == [UNAVAILABLE] * 2
    assert 0.9 < time.monotonic() - started < 5
    assert store.exists(keys) == [MISSING] * 2
    near = PageBatch(pages.addresses - arena.address + module_store._arena.address, LENGTHS)
    assert module_store.put(keys, near) == [OK] * 2, "a refused put leaves no trace"
    assert store.get(keys, pages) == [UNAVAILABLE] * 2


def test_a_page_too_large_for_any_member_is_full_and_its_neighbours_are_stored(
    pool: Pool, new_store: NewStore, rng: np.random.Generator
) -> None:
    arena = pool.arena(2 * MIB)
    store, keys = new_store(arena), new_keys(3)
    addresses = np.full((3, 150), arena.address, dtype=np.int64)
    lengths = (MIB,) * 150
    assert store.put(keys[:2], PageBatch(addresses[:2], lengths)) == [FULL] * 2
    assert store.put(keys, PageBatch(addresses[:, :1], lengths[:1])) == [OK] * 3
    assert store.exists(keys) == [OK] * 3


def test_a_null_address_fails_alone(
    module_store: StoreProcess, module_arena: SharedArena, rng: np.random.Generator
) -> None:
    keys, pages = new_keys(3), module_arena.place(3, LENGTHS, rng)
    pages.addresses[1, 1] = 0
    assert module_store.put(keys, pages) == [OK, FAILED, OK]
    assert module_store.get(keys, pages) == [OK, FAILED, OK]
    assert module_store.exists(keys) == [OK, MISSING, OK]


def test_a_key_with_a_nul_byte_fails_alone(
    module_store: StoreProcess, module_arena: SharedArena, rng: np.random.Generator
) -> None:
    """The library would cut it short, and answer 0."""
    (key,) = new_keys(1)
    keys, pages = [key, key + "\0tail"], module_arena.place(2, LENGTHS, rng)
    assert module_store.put(keys, pages) == [OK, FAILED]
    assert module_store.exists(keys) == [OK, FAILED]


def test_spans_that_are_no_spans_are_a_mistake_of_the_caller(
    module_store: StoreProcess, module_arena: SharedArena, rng: np.random.Generator
) -> None:
    pages = module_arena.place(1, LENGTHS, rng)
    for lengths in ((), (96, 0)):
        with pytest.raises(ValueError, match="spans of"):
            module_store.put(new_keys(1), PageBatch(pages.addresses, lengths))
    with pytest.raises(ValueError, match="2 keys for 1 pages"):
        module_store.get(new_keys(2), pages)


def test_a_client_closed_behind_the_stores_back_is_unavailable(
    pool: Pool, new_store: NewStore, rng: np.random.Generator
) -> None:
    """Batches then answer [], which a careless caller takes for 'all went well'."""
    arena, keys = pool.arena(), new_keys(1)
    store = new_store(arena)
    pages = arena.place(1, LENGTHS, rng)
    store.call("close_behind_its_back")
    with pytest.raises(StoreUnavailable, match="0 answers for 1 keys"):
        store.put(keys, pages)
    with pytest.raises(StoreUnavailable, match="0 answers for 1 keys"):
        store.get(keys, pages)
    with pytest.raises(StoreUnavailable, match="-3019"):
        store.exists(keys)


# --- joining and leaving


def test_a_process_joins_one_pool_once_and_again_after_it_has_left(
    pool: Pool, new_store: NewStore, rng: np.random.Generator
) -> None:
    arena, keys = pool.arena(), new_keys(1)
    store = new_store(arena)
    with pytest.raises(ConfigError, match="can join only one"):
        store.call("open_a_second_store")
    pages = arena.place(1, LENGTHS, rng)
    assert store.put(keys, pages) == [OK]
    store.close()
    store.open(StoreContext())
    assert store.get(keys, pages) == [OK]
    assert store.leave_by_exit() == 0, "the library crashes a process that exits while in a pool"


def test_joining_leaves_the_signal_handlers_of_the_process_alone(pool: Pool) -> None:
    """The library takes SIGTERM, SIGINT and SIGHUP over; a server needs its own."""
    process = pool.process(pool.arena())
    try:
        before = process.call("signal_handlers")
        process.open(StoreContext())
        assert process.call("signal_handlers") == before
    finally:
        process.kill()


def refused(pool: Pool, options: dict[str, Any]) -> tuple[Exception, float]:
    """What `open` says to a configuration, and after how many seconds; asked twice."""
    process = pool.process(pool.arena(), **options)
    try:
        process.problems()  # the worker is up
        started = time.monotonic()
        with pytest.raises((ConfigError, StoreUnavailable)) as first:
            process.open(StoreContext())
        took = time.monotonic() - started
        with pytest.raises(type(first.value)):
            process.open(StoreContext())
        return first.value, took
    finally:
        process.kill()


def test_another_max_dram_size_than_the_pools_is_refused_with_the_likely_reasons(
    pool: Pool,
) -> None:
    error, took = refused(pool, {"max_dram_size": "512MB"})
    assert isinstance(error, StoreUnavailable)
    assert error.code == -1
    assert "max_dram_size (512MB)" in str(error)
    assert took < 10


def test_another_world_size_is_refused_before_the_library_retries_for_a_minute(
    pool: Pool,
) -> None:
    error, took = refused(pool, {"world_size": 8})
    assert isinstance(error, ConfigError)
    assert "world_size is 8 but 32 in the pool" in str(error)
    assert took < 2


def test_without_a_meta_service_start_up_fails_within_seconds_and_says_what_to_start(
    pool: Pool,
) -> None:
    (port,) = memcache_pool.free_ports(1)
    for option in ("meta_service_url", "config_store_url"):
        error, took = refused(pool, {option: f"tcp://127.0.0.1:{port}"})
        assert isinstance(error, StoreUnavailable)
        for words in (f"127.0.0.1:{port}", "start the MetaService", f"memcache.{option}"):
            assert words in str(error)
        assert took < 5


def test_a_meta_service_that_never_answers_is_given_up_at_the_deadline(pool: Pool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        url = f"tcp://127.0.0.1:{mute.getsockname()[1]}"
        options = {"meta_service_url": url, "config_store_url": url, "metrics_url": ""}
        process = pool.process(pool.arena(), **options, connect_timeout_ms=1500)
        try:
            process.problems()
            started = time.monotonic()
            with pytest.raises(StoreUnavailable, match="within 1500 ms"):
                process.open(StoreContext())
            assert time.monotonic() - started < 4
            with pytest.raises(ConfigError, match="can join only one"):
                process.open(StoreContext())
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"protocol": "device_rdma", "dram_size": "0"}, "device_rdma is not emulated"),
        ({"dram_size": "9999GB", "max_dram_size": "9999GB"}, "MiB free"),
        ({"preferred_members": ["server-3"]}, "memcache.preferred_members: 'server-3'"),
        (
            {"protocol": "host_tcp", "hcom_url": "tcp://203.0.113.7:7000"},
            "is not an address of this host",
        ),
        (
            {
                "tls": {
                    "enabled": True,
                    "ca_path": "/nowhere/ca.pem",
                    "cert_path": "/nowhere/cert.pem",
                    "key_path": "/nowhere/key.pem",
                }
            },
            "memcache.tls.key_path is not a file",
        ),
    ],
    ids=["protocol", "shared memory", "member id", "own address", "tls files"],
)
def test_what_this_machine_cannot_do_is_said_before_the_pool_is_asked(
    pool: Pool, options: dict[str, Any], words: str
) -> None:
    error, took = refused(pool, options)
    assert isinstance(error, ConfigError)
    assert words in str(error)
    assert "/nowhere" not in str(error), "paths of secrets stay out of logs"
    assert took < 2


def test_problems_names_everything_at_once(pool: Pool) -> None:
    process = pool.process(
        pool.arena(),
        protocol="device_rdma",
        preferred_members=["x"],
        meta_service_url="tcp://127.0.0.1:9",
    )
    try:
        assert len(process.problems()) == 2
        assert "nobody listens at tcp://127.0.0.1:9" in process.unreachable()
    finally:
        process.kill()


# --- the MetaService goes and comes back


def eventually(call: Callable[[], Any], timeout_s: float = 30.0) -> Any:
    """The first answer of `call` that is not StoreUnavailable."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return call()
        except StoreUnavailable:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def test_a_killed_meta_service_makes_calls_unavailable_until_it_is_back(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    run_dir = ascend_emulation.private_run_dir()
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, run_dir, ignore_errors=True)
        tree = ascend_emulation.build()
        environment = ascend_emulation.environment(tree, run_dir, protocol="host_shm")
        meta = FixedMetaService(environment, memcache_pool.free_ports(3), run_dir)
        stack.enter_context(meta)
        section = {**COMMON, **meta.section}
        log_path = tmp_path / "log"
        arena = SharedArena(run_dir / "arena")
        store = StoreProcess(environment, section, arena, log_path)
        stack.callback(store.kill)
        eventually(lambda: store.open(StoreContext()))
        member = PoolMember(environment, {**section, "dram_size": "64MB"}, log_path)
        stack.callback(member.kill)
        member.joined()

        keys, pages = new_keys(4), arena.place(4, LENGTHS, rng)
        assert store.put(keys, pages) == [OK] * 4
        time.sleep(3)  # MetaService tells the members about their pages a little later
        meta.kill()
        time.sleep(2)  # a call in flight would hang for a minute
        for call in (
            lambda: store.exists(keys),
            lambda: store.get(keys, pages),
            lambda: store.put(new_keys(4), pages),
        ):
            started = time.monotonic()
            with pytest.raises(StoreUnavailable, match=r"MetaService.*-30"):
                call()
            assert time.monotonic() - started < 10, "a call that hangs does so for a minute"
        meta.start()
        eventually(lambda: store.exists(keys))
        deadline = time.monotonic() + 30
        while store.exists(keys) != [OK] * 4 and time.monotonic() < deadline:
            time.sleep(0.2)  # members report their pages one after the other
        assert store.get(keys, pages) == [OK] * 4


# --- emulated device memory


def test_device_memory_travels_in_the_device_directions(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    """Under device_sdma the emulation takes every address for device memory."""
    with ExitStack() as stack:
        meta = stack.enter_context(memcache_pool.MetaServiceProcess(protocol="device_sdma"))
        section = {
            "protocol": "device_sdma",
            "dram_size": "1GB",
            "max_dram_size": "1GB",
            "world_size": 8,
            "meta_service_url": meta.meta_service_url,
            "config_store_url": meta.config_store_url,
            "metrics_url": meta.metrics_url,
        }
        arena = SharedArena(meta.run_dir / "arena")
        store = StoreProcess(meta.environment, section, arena, tmp_path / "log")
        stack.callback(store.kill)
        store.open(StoreContext(memory=Memory.DEVICE))
        keys, pages = new_keys(3), arena.place(3, LENGTHS, rng)
        arena.scramble(rng)
        expected = [arena.read(pages, row) for row in range(3)]
        assert store.put(keys, pages) == [OK] * 3
        arena.bytes[:] = 0
        assert store.get(keys, pages) == [OK] * 3
        assert [arena.read(pages, row) for row in range(3)] == expected


# --- the command


def test_a_member_says_one_line_when_linked_and_leaves_on_sigterm(pool: Pool) -> None:
    assert pool.joined["event"] == "joined"
    assert pool.joined["dram_bytes"] == 128 * MIB
    section = {**pool.section, "dram_size": "64MB"}
    member = PoolMember(pool.meta.environment, section, pool.log_path)
    try:
        joined = member.joined()
        assert joined["pool_bytes"] >= 192 * MIB
        assert joined["member_id"] != pool.joined["member_id"]
        assert pool.meta.links().complete(2)
        code, rest = member.end(signal.SIGTERM)
    finally:
        member.kill()
    assert code == 0
    assert rest == '{"event": "left"}\n', "the library's lines belong on stderr"


def test_a_member_without_a_pool_exits_with_3_and_a_bad_one_with_2(
    pool: Pool, tmp_path: Path
) -> None:
    for number, (options, code) in enumerate(
        [
            ({"meta_service_url": "tcp://127.0.0.1:9"}, 3),
            ({"max_dram_size": "512MB"}, 3),
            ({"protocol": "device_rdma", "dram_size": "1GB", "max_dram_size": "1GB"}, 2),
        ]
    ):
        log = tmp_path / f"log{number}"
        section = {**pool.section, "dram_size": "64MB", **options}
        member = PoolMember(pool.meta.environment, section, log)
        out, _ = member.process.communicate(timeout=60)
        assert (member.process.returncode, out) == (code, "")
        assert "ascend-direct: " in log.read_text()
