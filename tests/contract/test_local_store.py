# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""The embedded store: the contract, and what it promises beyond it (processes, bounds, faults)."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import multiprocessing
import os
import random
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest

from ascend_direct.config import MIB
from ascend_direct.errors import ConfigError, StoreUnavailable
from ascend_direct.store.base import (
    Memory,
    PageBatch,
    PageStatus,
    PageStore,
    StoreContext,
    provider,
)
from ascend_direct.store.local import LocalStore, create
from tests.contract.store_contract import Arena, StoreContract, StoreFactory

OK, MISSING, FULL = PageStatus.OK, PageStatus.MISSING, PageStatus.FULL
SPAN_BYTES, SPANS = 4096, 8
PAGE_BYTES = SPAN_BYTES * SPANS
SIZE_BYTES = 16 * MIB
spawn = multiprocessing.get_context("spawn")


def opened(path: Path | str, size_bytes: int = SIZE_BYTES, **options: Any) -> PageStore:
    store = create({"path": str(path), "size_bytes": size_bytes, **options})
    store.open(StoreContext())
    return store


def words(key: str) -> bytes:
    """The bytes that belong to a key: any process can tell whether a page is right."""
    return hashlib.sha256(key.encode()).digest() * (PAGE_BYTES // 32)


class Pages:
    """Memory for some pages, with helpers that put and check key-derived bytes."""

    def __init__(self, count: int) -> None:
        self.arena = Arena(2 * (count + 1) * PAGE_BYTES)
        self.batch = self.arena.place(count, (SPAN_BYTES,) * SPANS, np.random.default_rng(1))

    def put(self, store: PageStore, *keys: str) -> list[PageStatus]:
        for row, key in enumerate(keys):
            self.arena.write(self.batch, row, words(key))
        return store.put(keys, self._rows(len(keys)))

    def get(self, store: PageStore, *keys: str) -> list[PageStatus]:
        """Also checks that each page answered OK is the key's, whole."""
        self.arena.bytes[:] = 0
        answers = store.get(keys, self._rows(len(keys)))
        for row, (key, answer) in enumerate(zip(keys, answers, strict=True)):
            assert answer is not OK or self.arena.read(self.batch, row) == words(key)
        return answers

    def _rows(self, count: int) -> PageBatch:
        return PageBatch(self.batch.addresses[:count], self.batch.lengths_bytes)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(path: Path) -> Iterator[PageStore]:
    store = opened(path)
    yield store
    store.close()


class TestLocalStore(StoreContract):
    @pytest.fixture
    def store_factory(self, path: Path) -> StoreFactory:
        def make(context: StoreContext) -> PageStore:
            store = create({"path": str(path), "size_bytes": 128 * MIB})
            store.open(context)
            return store

        return make


# --- processes that share it


@contextlib.contextmanager
def process(target: Callable[..., None], *arguments: Any) -> Iterator[SpawnProcess]:
    worker = spawn.Process(target=target, args=arguments, daemon=True)
    worker.start()
    try:
        yield worker
    finally:
        worker.kill()
        worker.join(30)


def put_and_get(path: str, put: list[str], get: list[str], answers: Any) -> None:
    store, pages = opened(path), Pages(max(len(put), len(get)))
    answers.put((pages.put(store, *put), pages.get(store, *get)))
    store.close()


def put_for_ever(path: str, name: str, ready: Any) -> None:
    store, pages = opened(path), Pages(16)
    for number in itertools.count():
        keys = [f"{name}:{number}:{row}" for row in range(16)]
        answers = pages.put(store, *keys)
        assert set(answers) <= {OK, FULL}, answers
        pages.get(store, *keys)
        ready.set()


def hold_a_read_transaction(path: str, ready: Any) -> None:
    env = lmdb.open(path, max_dbs=3, map_size=SIZE_BYTES, sync=False, metasync=False)
    with env.begin():
        ready.set()
        time.sleep(600)


def hold_the_writer_lock(path: str, ready: Any) -> None:
    env = lmdb.open(path, max_dbs=3, map_size=SIZE_BYTES, sync=False, metasync=False)
    with env.begin(write=True) as txn:
        txn.put(b"torn", b"x" * 100_000)
        ready.set()
        time.sleep(600)


def test_two_processes_share_pages(store: PageStore, path: Path) -> None:
    pages, answers = Pages(2), spawn.Queue()
    assert pages.put(store, "mine", "ours") == [OK, OK]
    with process(put_and_get, str(path), ["theirs", "ours"], ["mine", "ours", "no"], answers):
        assert answers.get(timeout=60) == ([OK, OK], [OK, OK, MISSING])
    assert pages.get(store, "theirs", "ours") == [OK, OK]


@pytest.mark.parametrize("seed", range(2))
def test_a_writer_killed_in_mid_put_leaves_every_page_whole(path: Path, seed: int) -> None:
    """Two writers under eviction; one is killed at a random moment, again and again."""
    rng, pages = random.Random(seed), Pages(16)
    with process(put_for_ever, str(path), "survivor", survivor := spawn.Event()):
        for round_number in range(3):
            name = f"victim{round_number}"
            with process(put_for_ever, str(path), name, ready := spawn.Event()) as victim:
                assert ready.wait(60)
                time.sleep(rng.uniform(0, 0.1))
                assert victim.is_alive()
                victim.kill()
                victim.join(30)
        survivor.clear()
        assert survivor.wait(60), "the other writer stopped"
    store = opened(path)
    stored = stored_keys(store)
    assert any(key.startswith(("victim", "survivor")) for key in stored)
    for first in range(0, len(stored), 16):
        keys = stored[first : first + 16]
        assert pages.get(store, *keys) == [OK] * len(keys)
    assert pages.put(store, "after") == [OK]
    store.close()


@pytest.mark.parametrize("target", [hold_a_read_transaction, hold_the_writer_lock])
def test_a_process_killed_inside_a_transaction_blocks_nobody(
    path: Path, target: Callable[..., None]
) -> None:
    store, pages = opened(path), Pages(16)
    with process(target, str(path), ready := spawn.Event()) as victim:
        assert ready.wait(60)
        victim.kill()
        victim.join(30)
    for number in range(4 * SIZE_BYTES // PAGE_BYTES // 16):
        assert pages.put(store, *(f"{number}:{row}" for row in range(16))) == [OK] * 16
    store.close()


def test_a_stalled_reader_makes_puts_full_not_stuck(path: Path) -> None:
    store, pages = opened(path), Pages(16)
    with process(hold_a_read_transaction, str(path), ready := spawn.Event()):
        assert ready.wait(60)
        answers = [
            answer
            for number in range(2 * SIZE_BYTES // PAGE_BYTES // 16)
            for answer in pages.put(store, *(f"{number}:{row}" for row in range(16)))
        ]
        assert set(answers) == {OK, FULL}
    assert pages.put(store, "after") == [OK]
    assert pages.get(store, "after") == [OK]
    store.close()


def test_a_store_opened_before_a_fork_refuses_the_child(store: PageStore) -> None:
    pages = Pages(1)
    assert pages.put(store, "k") == [OK]
    child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(BaseException):
            try:
                store.exists(["k"])
            except StoreUnavailable as error:
                store.close()
                code = 0 if "before a fork" in str(error) else 2
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert pages.get(store, "k") == [OK]


# --- size and eviction


def stored_keys(store: PageStore) -> list[str]:
    """All keys, oldest first, read past the store's interface."""
    assert isinstance(store, LocalStore)
    with store._env.begin(db=store._ages) as txn, txn.cursor() as cursor:
        return [bytes(value).decode() for _, value in cursor]


def test_the_file_never_outgrows_its_bound_while_three_processes_write(path: Path) -> None:
    largest_bytes, events = 0, [spawn.Event() for _ in range(3)]
    with contextlib.ExitStack() as stack:
        for number, ready in enumerate(events):
            stack.enter_context(process(put_for_ever, str(path), f"w{number}", ready))
        assert all(ready.wait(60) for ready in events)
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline:
            largest_bytes = max(largest_bytes, (path / "data.mdb").stat().st_size)
            time.sleep(0.01)
    assert SIZE_BYTES // 2 < largest_bytes <= SIZE_BYTES
    store = opened(path)
    stats = store.stats()
    assert stats.used_bytes is not None
    assert stats.capacity_bytes is not None
    assert stats.used_bytes <= stats.capacity_bytes <= SIZE_BYTES
    store.close()


def test_a_full_store_evicts_the_oldest_pages_and_keeps_the_newest(store: PageStore) -> None:
    pages, by_age = Pages(8), []
    for number in range(2 * SIZE_BYTES // PAGE_BYTES // 8):
        keys = [f"{number}:{row}" for row in range(8)]
        assert pages.put(store, *keys) == [OK] * 8
        by_age += reversed(keys)
    held = [answer is OK for answer in store.exists(by_age)]
    assert held == sorted(held), "a younger page went before an older one"
    assert sum(held) * PAGE_BYTES > SIZE_BYTES * 2 // 3
    assert pages.get(store, *keys) == [OK] * 8


def test_a_page_that_is_used_outlives_those_that_are_not(store: PageStore) -> None:
    pages = Pages(8)
    assert pages.put(store, "precious") == [OK]
    for number in range(4 * SIZE_BYTES // PAGE_BYTES // 8):
        assert pages.put(store, *(f"{number}:{row}" for row in range(8))) == [OK] * 8
        assert pages.get(store, "precious") == [OK]
    assert store.exists(["0:0"]) == [MISSING]


def test_a_process_that_only_reads_makes_pages_young_too_in_batches(
    store: PageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ascend_direct.store.local._NOTED_S", 3600.0)
    keys = [f"{row}" for row in range(1026)]
    pages = Arena().place(len(keys), (32,), np.random.default_rng(1))
    assert set(store.put(keys, pages)) == {OK}
    before = stored_keys(store)
    assert store.get(["0", "1"], PageBatch(pages.addresses[:2], (32,))) == [OK] * 2
    assert stored_keys(store) == before, "two uses are not worth a transaction"
    assert set(store.get(keys[2:1024], PageBatch(pages.addresses[2:1024], (32,)))) == {OK}
    assert set(stored_keys(store)[:2]) == {"1024", "1025"}, "the two that nobody read"


def test_a_process_that_reads_little_makes_pages_young_after_a_while(
    store: PageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ascend_direct.store.local._NOTED_S", 0.0)
    pages = Pages(2)
    pages.put(store, "first", "second")
    assert stored_keys(store) == ["second", "first"]
    pages.get(store, "second")
    assert stored_keys(store) == ["first", "second"]


def test_a_process_that_reads_the_same_pages_again_and_again_keeps_them_young(
    store: PageStore,
) -> None:
    pages = Pages(16)
    for name in ("hot", "cold"):
        assert pages.put(store, *(f"{name}{row}" for row in range(16))) == [OK] * 16
    for _ in range(1024 // 16):
        assert pages.get(store, *(f"hot{row}" for row in range(16))) == [OK] * 16
    assert {key[:4] for key in stored_keys(store)[:16]} == {"cold"}


def test_of_a_prompt_the_tail_is_evicted_before_the_prefix(store: PageStore) -> None:
    Pages(4).put(store, "prefix", "middle", "tail")
    assert stored_keys(store) == ["tail", "middle", "prefix"]


def test_pages_of_different_sizes_share_the_space(store: PageStore) -> None:
    rng, arena = np.random.default_rng(3), Arena(4 * MIB)
    answers = []
    for number in range(300):
        size_bytes = int(rng.choice([700, 40_000, 150_000, 1_000_000]))
        pages = arena.place(1, (size_bytes,), rng)
        answers += store.put([f"{number}"], pages)
        assert store.get([f"{number}"], pages) in ([OK], [MISSING])
    assert answers.count(FULL) <= 3, "fragmentation is met by eviction"


def test_a_page_larger_than_the_store_is_full_and_evicts_nothing(store: PageStore) -> None:
    pages, arena = Pages(1), Arena(2 * SIZE_BYTES)
    assert pages.put(store, "small") == [OK]
    huge = arena.place(1, (SIZE_BYTES,), np.random.default_rng(1))
    assert store.put(["huge"], huge) == [FULL]
    assert pages.get(store, "small") == [OK]


# --- a full disk


def fill_a_disk(path: str, limit: Callable[[], None], relax: Callable[[], None]) -> None:
    """Puts before, while and after the disk is full; ends the process with an error if wrong."""
    store, pages = opened(path, 4 * MIB), Pages(16)
    limit()
    assert pages.put(store, *(f"a{row}" for row in range(16))) == [FULL] * 16
    assert pages.get(store, "a0") == [MISSING]
    relax()
    assert pages.put(store, *(f"b{row}" for row in range(16))) == [OK] * 16
    limit()
    for number in range(8):
        assert set(pages.put(store, *(f"c{number}:{row}" for row in range(16)))) <= {OK, FULL}
        assert set(pages.get(store, *(f"b{row}" for row in range(16)))) <= {OK, MISSING}
    relax()
    assert pages.put(store, *(f"d{row}" for row in range(16))) == [OK] * 16
    assert pages.get(store, *(f"d{row}" for row in range(16))) == [OK] * 16
    store.close()


def fill_by_file_size_limit(path: str) -> None:
    def limit() -> None:
        size_bytes = (Path(path) / "data.mdb").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, resource.RLIM_INFINITY))

    def relax() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)

    fill_a_disk(path, limit, relax)


def fill_small_file_system(path: str) -> None:
    filler = Path(path).parent / "filler"

    def limit() -> None:
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    fill_a_disk(path, limit, filler.unlink)


def in_new_process(call: str, *prefix: str) -> subprocess.CompletedProcess[str]:
    code = f"from tests.contract import test_local_store as t; t.{call}"
    command = [*prefix, sys.executable, "-c", code]
    root = Path(__file__).resolve().parents[2]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)


def test_a_file_that_may_not_grow_makes_puts_full(path: Path) -> None:
    done = in_new_process(f"fill_by_file_size_limit({str(path)!r})")
    assert done.returncode == 0, done.stderr


def test_a_full_tmpfs_makes_puts_full(tmp_path: Path) -> None:
    own_mounts = ["unshare", "--user", "--map-root-user", "--mount"]
    if os.geteuid() == 0:
        own_mounts = ["unshare", "--mount"]
    mount = f"mount -t tmpfs -o size=6m,mode=700 tmpfs {tmp_path}"
    if shutil.which("unshare") is None or subprocess.run([*own_mounts, "true"]).returncode:
        pytest.skip("a small tmpfs needs the right to mount; the file size limit is tested above")
    call = f"fill_small_file_system({str(tmp_path / 'store')!r})"
    done = in_new_process(call, *own_mounts, "sh", "-c", f'{mount} && exec "$@"', "sh")
    assert done.returncode == 0, done.stderr


# --- opening


def test_pages_outlive_the_process(path: Path) -> None:
    pages, answers = Pages(1), spawn.Queue()
    with process(put_and_get, str(path), ["k"], [], answers) as worker:
        answers.get(timeout=60)
        worker.join(60)
    store = opened(path)
    assert pages.get(store, "k") == [OK]
    store.close()


@pytest.mark.parametrize(("sync", "answer"), [(False, MISSING), (True, OK)])
def test_after_a_reboot_only_synced_pages_are_trusted(
    path: Path, sync: bool, answer: PageStatus
) -> None:
    store, pages = opened(path, sync=sync), Pages(1)
    pages.put(store, "k")
    store.close()
    if not sync:
        (path / "boot_id").write_text("another boot\n")
    store = opened(path, sync=sync)
    assert pages.get(store, "k") == [answer]
    assert pages.put(store, "k") == [OK]
    store.close()
    store = opened(path, sync=sync)
    assert pages.get(store, "k") == [OK]
    store.close()


def test_only_the_user_can_read_the_files(store: PageStore, path: Path) -> None:
    old = os.umask(0)
    try:
        inner = opened(path / "inner")
        inner.close()
    finally:
        os.umask(old)
    for directory in (path, path / "inner"):
        assert directory.stat().st_mode & 0o777 == 0o700
        for file in directory.iterdir():
            assert file.is_dir() or file.stat().st_mode & 0o777 == 0o600, file


def test_device_memory_is_refused(path: Path) -> None:
    with pytest.raises(ConfigError, match="host-visible KV; use memcache on an NPU"):
        create({"path": str(path)}).open(StoreContext(memory=Memory.DEVICE))
    assert not path.exists()


def file_instead_of_directory(path: Path) -> None:
    path.write_text("")


def file_instead_of_parent(path: Path) -> None:
    path.symlink_to(path.parent / "file" / "store")
    (path.parent / "file").write_text("")


def directory_anyone_may_write(path: Path) -> None:
    path.mkdir()
    path.chmod(0o777)


def directory_that_is_not_ours(path: Path) -> None:
    path.symlink_to("/proc/self")


def foreign_file(path: Path) -> None:
    path.mkdir(mode=0o700)
    (path / "data.mdb").write_bytes(b"not a database" * 1000)


def other_size(path: Path) -> None:
    opened(path, 2 * SIZE_BYTES).close()


def cut_short(path: Path) -> None:
    store = opened(path)
    Pages(8).put(store, *"abcdefgh")
    store.close()
    os.truncate(path / "data.mdb", 5 * 4096)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (file_instead_of_directory, "name a directory you can write"),
        (file_instead_of_parent, "name a directory you can write"),
        (directory_anyone_may_write, "writable by, others, .* name a new directory"),
        (directory_that_is_not_ours, "local.path /proc"),
        (foreign_file, "delete it"),
        (other_size, r"size_bytes 33554432.*not.*size_bytes 16777216.*use one size"),
        (cut_short, "cut short; stop its servers and delete it"),
    ],
)
def test_a_path_that_cannot_work_says_what_to_do(
    path: Path, prepare: Callable[[Path], None], message: str
) -> None:
    prepare(path)
    with pytest.raises(ConfigError, match=message) as caught:
        opened(path)
    assert len(caught.value.reasons) == 1


def test_a_size_that_the_file_system_cannot_hold_is_refused_with_numbers(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"size_bytes is \d+ MiB, but .* has room for \d+ MiB"):
        opened(path, 1 << 50)
    assert not (path / "data.mdb").exists()


def test_a_second_store_on_one_path_in_a_process_is_refused(
    store: PageStore, path: Path, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(path)
    for name in (path, tmp_path / "link"):
        with pytest.raises(ConfigError, match="one store per path and process"):
            opened(name)
    assert Pages(1).put(store, "k") == [OK]


def test_the_section_is_checked_whole() -> None:
    with pytest.raises(ConfigError, match="'lots' is not a size"):
        create({"size_bytes": "lots"})
    with pytest.raises(ConfigError) as caught:
        create({"size_bytes": 1, "sync": 3, "colour": "blue"})
    assert len(caught.value.reasons) == 3


def test_the_entry_point_leads_here() -> None:
    assert provider("local") is create


# --- what lies in the file, and what LMDB says


@pytest.mark.parametrize(
    "value",
    [
        b"",
        words("k")[:PAGE_BYTES],
        b"ADKV" + bytes(12) + words("k"),
        b"XXXX\x01\0\0\0" + PAGE_BYTES.to_bytes(8, "little") + words("k"),
        b"ADKV\x01\0\0\0" + PAGE_BYTES.to_bytes(8, "little") + words("k")[:-1],
    ],
    ids=["empty", "no header", "no size", "other magic", "one byte short"],
)
def test_a_foreign_or_truncated_object_is_a_mismatch(store: PageStore, value: bytes) -> None:
    assert isinstance(store, LocalStore)
    with store._env.begin(write=True) as txn:
        txn.put(b"k", value, db=store._objects)
    pages = Pages(1)
    assert pages.get(store, "k") == [PageStatus.MISMATCH]


LMDB_ERRORS = [
    error
    for error in vars(lmdb).values()
    if isinstance(error, type) and issubclass(error, lmdb.Error)
]


@pytest.mark.parametrize("error", LMDB_ERRORS)
def test_every_lmdb_error_is_mapped(store: PageStore, error: type[Exception]) -> None:
    assert isinstance(store, LocalStore)
    with pytest.raises(StoreUnavailable), store._call("get"):
        raise error("injected")
    no_room = {"MapFullError", "TxnFullError", "DiskError", "MemoryError"}
    with contextlib.ExitStack() as stack:
        if error.__name__ not in no_room:
            stack.enter_context(pytest.raises(lmdb.Error))
        store._require_no_room(error("injected"))


def test_close_waits_for_a_call_that_is_still_copying(path: Path) -> None:
    """Unmapping the file under a copy would kill this process."""
    store, pages, failures = opened(path), Pages(64), []
    keys = [f"{row}" for row in range(64)]
    pages.put(store, *keys)
    running = threading.Event()

    def read() -> None:
        try:
            while True:
                pages.get(store, *keys)
                running.set()
        except StoreUnavailable:
            failures.append("unavailable")

    reader = threading.Thread(target=read)
    reader.start()
    assert running.wait(30)
    store.close()
    reader.join(30)
    assert failures == ["unavailable"]
