# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""A real server that is up before its pool: it serves at once, and uses the pool when it appears;
and again after the pool's MetaService was killed and started anew."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import ascend_emulation
import memcache_pool
import pytest
from sglang_cpu.server import SGLangServer
from two_instances.cluster import linked_args

from ascend_direct.errors import StoreUnavailable
from ascend_direct.store.meta_service import require_listening
from tests.contract.memcache_processes import FixedMetaService, PoolMember

pytestmark = pytest.mark.memcache

COMMON = {"protocol": "host_shm", "max_dram_size": "256MB", "world_size": 32}
LIMITS = {"lookup_timeout_ms": 2_000, "load_timeout_ms": 20_000}
# Attempts to attach, the breaker's pauses, and a busy machine.
ATTACH_S = 120.0


class World:
    """A server, and the pool it is told of, not started."""

    def __init__(self, model: Path, folder: Path, say: Callable[[str], None], undo: ExitStack):
        self.run_dir = ascend_emulation.private_run_dir()
        undo.callback(shutil.rmtree, self.run_dir, ignore_errors=True)
        self.environment = ascend_emulation.environment(
            ascend_emulation.build(), self.run_dir, protocol="host_shm"
        )
        self.meta = FixedMetaService(self.environment, memcache_pool.free_ports(3), self.run_dir)
        undo.callback(self.meta.kill)
        self.section = {**COMMON, **self.meta.section}
        self._log = folder / "member.log"
        options = {"store": "memcache", "memcache": self.section, **LIMITS}
        self.server = SGLangServer(
            model,
            ["--page-size", "16", *linked_args({**options, "on_pool_unavailable": "degrade"})],
            env={"SGLANG_PLUGINS": "ascend_direct", **self.environment},
            name="before its pool",
            log_path=folder / "server.log",
            progress=say,
        )
        undo.callback(self.server.stop)

    def start_member(self, undo: ExitStack) -> None:
        section = {**self.section, "dram_size": "64MB"}
        member = PoolMember(self.environment, section, self._log)
        undo.callback(member.kill)
        assert member.joined()["event"] == "joined"


@pytest.fixture
def world(
    no_servers: None, model: Path, tmp_path: Path, say: Callable[[str], None]
) -> Iterator[tuple[World, ExitStack]]:
    with ExitStack() as undo:
        yield World(model, tmp_path, say, undo), undo


def ask(server: SGLangServer, prompt: list[int]) -> tuple[list[int], int]:
    """Tokens of the answer, and how many of the prompt came from the pool."""
    answer = server.generate(prompt, 4, return_cached_tokens_details=True)
    return answer.output_ids, answer.cached_tokens_details.get("storage", 0)


def served_from_pool(server: SGLangServer, prompt: list[int], truth: list[int]) -> None:
    """In a while the prompt is stored, then loaded; each answer on the way is right."""
    deadline_s = time.monotonic() + ATTACH_S
    while True:
        tokens, from_pool = ask(server, prompt)
        assert tokens == truth
        if from_pool:
            return
        assert time.monotonic() < deadline_s, server.log_text()[-3000:]
        time.sleep(0.5)
        server.flush()


def test_a_server_that_is_up_before_its_pool_uses_it_when_it_appears_and_after_a_restart(
    world: tuple[World, ExitStack], dice: random.Random
) -> None:
    here, undo = world
    here.server.start()
    here.server.wait_ready()
    prompts = [[dice.randrange(100, 1000) for _ in range(400)] for _ in range(2)]
    truth = [ask(here.server, prompt) for prompt in prompts]
    assert [from_pool for _, from_pool in truth] == [0, 0]
    here.server.flush()

    here.meta.start()
    deadline_s = time.monotonic() + 30
    while not _listens(here.section["meta_service_url"]):
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
    here.start_member(undo)
    served_from_pool(here.server, prompts[0], truth[0][0])

    here.meta.kill()
    here.server.flush()
    assert ask(here.server, prompts[1])[0] == truth[1][0]
    here.meta.start()
    served_from_pool(here.server, prompts[1], truth[1][0])


def _listens(url: str) -> bool:
    try:
        require_listening("meta_service_url", url)
    except StoreUnavailable:
        return False
    return True
