# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""A pool member in a process of its own, and the handle by which a test tells it what to do.

A member holds an array like a KV pool, ``[layers, K or V, slots, bytes]``, so that a page is one
fragment per layer and buffer. As a program, ``pool_member.py round_trip PROTOCOL`` starts a
MetaService and one member and exits with 0 when a page came back as it went.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import memcache_pool

LAYERS, BUFFERS, SLOTS, FRAGMENT_BYTES = 4, 2, 24, 4096
PAGE_BYTES = LAYERS * BUFFERS * FRAGMENT_BYTES
L2G, G2L, G2H, H2G = 0, 1, 2, 3
ANSWER_TIMEOUT_S = 60.0

Bytes = npt.NDArray[np.uint8]


def page_bytes(seed: int) -> Bytes:
    """The page that belongs to a seed, ``[layers, K or V, bytes]``."""
    shape = (LAYERS, BUFFERS, FRAGMENT_BYTES)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def digest(page: Bytes) -> str:
    return hashlib.sha256(np.ascontiguousarray(page).tobytes()).hexdigest()


class Member:
    """The test's side: starts the process, sends it calls, ends it. Ends only its own process."""

    def __init__(
        self,
        name: str,
        meta: memcache_pool.MetaServiceProcess,
        *,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.log_file = meta.run_dir / f"{name}.log"
        self._connection, theirs = Pipe()
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, __file__, "serve", str(theirs.fileno())],
                env={**os.environ, **meta.environment, **(variables or {})},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        theirs.close()

    def call(self, name: str, *arguments: Any, **options: Any) -> Any:
        self.send(name, *arguments, **options)
        return self.answer()

    def send(self, name: str, *arguments: Any, **options: Any) -> None:
        self._connection.send((name, arguments, options))

    def answer(self) -> Any:
        try:
            if self._connection.poll(ANSWER_TIMEOUT_S):
                return self._connection.recv()
        except EOFError:
            pass
        log = self.log_file.read_text(errors="replace")
        raise AssertionError(f"the member gave no answer (status {self.process.poll()}):\n{log}")

    def end(self) -> None:
        self._connection.close()
        self.process.kill()
        self.process.wait()


class Pool:
    """A MetaService and its members, linked when the block begins and ended when it ends."""

    def __init__(self, members: int, protocol: str, *, stop_grace_s: float = 0.2) -> None:
        self.meta = memcache_pool.MetaServiceProcess(protocol=protocol, stop_grace_s=stop_grace_s)
        self.protocol = protocol
        self.members: list[Member] = []
        self._count = members

    def __enter__(self) -> Pool:
        self.meta.start()
        try:
            for number in range(self._count):
                self.add(f"member-{number}")
            codes = [member.answer() for member in self.members]
            assert codes == [(0, 0)] * self._count, codes
            self.meta.wait_linked(self._count, timeout_s=30)
        except BaseException:
            self.__exit__()
            raise
        return self

    def add(self, name: str) -> Member:
        """A member that has been told to join; its answer is (setup code, init code)."""
        member = Member(name, self.meta)
        self.members.append(member)
        [hcom_port] = memcache_pool.free_ports(1)
        member.send(
            "join", self.protocol, self.meta.meta_service_url, self.meta.config_store_url, hcom_port
        )
        return member

    def __exit__(self, *_: object) -> None:
        for member in self.members:
            member.end()
        self.meta.stop()


# ---- inside the process of the member --------------------------------------------------------


class _Server:
    """Its public methods are what a test can call."""

    def __init__(self) -> None:
        from memcache_hybrid import DistributedObjectStore

        self._store = DistributedObjectStore()
        self._arrays: dict[str, Bytes] = {}

    def join(self, protocol: str, meta_url: str, store_url: str, hcom_port: int) -> tuple[int, int]:
        from memcache_hybrid import LocalConfig

        config = LocalConfig()
        config.meta_service_url, config.config_store_url = meta_url, store_url
        config.hcom_url = f"tcp://127.0.0.1:{hcom_port}"
        config.protocol, config.world_size, config.log_level = protocol, 8, "error"
        config.dram_size = config.max_dram_size = "1GB" if protocol == "device_sdma" else "32MB"
        return self._store.setup(config), self._store.init(0, True)

    def put(
        self, keys: Sequence[str], seed: int, slots: Sequence[int], *, direction: int, memory: str
    ) -> list[int]:
        """Key ``i`` gets the page of ``seed + i``, which lies in ``slots[i]``."""
        array = self._array(memory)
        for number, slot in enumerate(slots):
            array[:, :, slot] = page_bytes(seed + number)
        addresses, sizes = self._fragments(array, slots)
        return list(self._store.batch_put_from_layers(keys, addresses, sizes, direction))

    def get(
        self, keys: Sequence[str], slots: Sequence[int], *, direction: int, memory: str
    ) -> tuple[list[int], list[str], bool]:
        """Codes, digests of the pages, and whether every other slot was left alone."""
        array = self._array(memory)
        array[...] = 0xA5
        addresses, sizes = self._fragments(array, slots)
        codes = list(self._store.batch_get_into_layers(keys, addresses, sizes, direction))
        others = np.delete(array, list(slots), axis=2)
        return codes, [digest(array[:, :, slot]) for slot in slots], bool((others == 0xA5).all())

    def get_bytes(self, key: str, fragment_bytes: int, *, direction: int, memory: str) -> list[int]:
        """Get one key into fragments of another size than it was put from."""
        addresses, _ = self._fragments(self._array(memory), [0])
        sizes = [[fragment_bytes] * len(addresses[0])]
        return list(self._store.batch_get_into_layers([key], addresses, sizes, direction))

    def exists(self, keys: Sequence[str]) -> list[int]:
        return list(self._store.batch_is_exist(keys))

    def _array(self, memory: str) -> Bytes:
        if memory not in self._arrays:
            shape = (LAYERS, BUFFERS, SLOTS, FRAGMENT_BYTES)
            flat = np.zeros(SLOTS * PAGE_BYTES, np.uint8)
            self._arrays[memory] = (flat if memory == "cpu" else _device_bytes(flat.size)).reshape(
                shape
            )
        return self._arrays[memory]

    def _fragments(
        self, array: Bytes, slots: Sequence[int]
    ) -> tuple[list[list[int]], list[list[int]]]:
        addresses = [
            [
                int(array[layer, buffer, slot].ctypes.data)
                for layer in range(LAYERS)
                for buffer in range(BUFFERS)
            ]
            for slot in slots
        ]
        return addresses, [[FRAGMENT_BYTES] * (LAYERS * BUFFERS)] * len(slots)


def _device_bytes(size: int) -> Bytes:
    pointer = ctypes.c_void_p()
    driver = ctypes.CDLL("libascendcl.so")
    assert driver.aclrtMalloc(ctypes.byref(pointer), ctypes.c_size_t(size), 0) == 0
    assert pointer.value is not None
    return np.frombuffer((ctypes.c_uint8 * size).from_address(pointer.value), np.uint8)


def _serve(descriptor: int) -> None:
    connection, server = Connection(descriptor), _Server()
    while True:
        try:
            name, arguments, options = connection.recv()
        except EOFError:
            os._exit(0)  # without close(), which takes seconds: the test has ended
        connection.send(getattr(server, name)(*arguments, **options))


def round_trip(protocol: str) -> bool:
    """Whether a pool of one member works here."""
    is_sdma = protocol == "device_sdma"
    with Pool(1, protocol) as pool:
        [member] = pool.members
        stored = member.call("put", ["k"], 1, [3], direction=L2G if is_sdma else H2G, memory="cpu")
        loaded = member.call("get", ["k"], [5], direction=G2L if is_sdma else G2H, memory="cpu")
    return stored == [0] and loaded == ([0], [digest(page_bytes(1))], True)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        _serve(int(sys.argv[2]))
    sys.exit(0 if round_trip(sys.argv[2]) else 1)
