# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Prefill and decode nodes of different TP sizes on one pool: what decode generated is not computed
again, and nothing that happens while it generates hurts the others.

E2E_PD_REQUESTS sets the number of requests of the leak test; 500 if it is not set (CI sends fewer).
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from prefill_decode.conversations import Conversation, generated_share, stored_pages
from prefill_decode.nodes import Nodes
from sglang_cpu.client import RequestError
from sglang_cpu.models import make_model
from sglang_cpu.server import SGLangServer
from two_instances.cluster import MemcachePool
from two_instances.run import make_prompts

from .farm import CHECKS, Farm, Watch

REQUESTS = int(os.environ.get("E2E_PD_REQUESTS", "500"))
PAGE_SIZE, STRIDE_TOKENS = 16, 64
QUESTION_TOKENS, ANSWER_TOKENS = 80, 160
STORE_TIMEOUT_MS = 4_000
# MemCache tries a call for a minute; pages under a call that has not returned stay pinned.
CALL_RETURNS_S = 150.0
DIRECT = {
    "lookup_timeout_ms": 2_000,
    "load_timeout_ms": 20_000,
    "store_timeout_ms": STORE_TIMEOUT_MS,
    "decode_stride_tokens": STRIDE_TOKENS,
}

pytestmark = [pytest.mark.memcache, pytest.mark.pd]
Say = Callable[[str], None]
Answers = Callable[[list[int], int], list[int]]


@contextmanager
def pair(folder: Path, kind: str, say: Say, **changes: Any) -> Iterator[Nodes]:
    """One prefill and one decode node."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CHECKS.items():
            patch.setenv(name, value)
        with Nodes(
            MemcachePool(member_size="256MB"),
            make_model(folder / kind, kind),
            ["--page-size", str(PAGE_SIZE)],
            direct=DIRECT | changes.pop("direct", {}),
            log_dir=folder / f"{kind}-logs",
            progress=say,
            **changes,
        ) as nodes:
            yield nodes


@pytest.fixture(scope="module")
def gqa(farm: Farm, tmp_path_factory: pytest.TempPathFactory, say: Say) -> Iterator[Nodes]:
    """Two ranks prefill, one decodes: pages are kept by head, so that both find them."""
    farm.clear()
    folder = tmp_path_factory.mktemp("pd")
    with pair(folder, "gqa", say, tp_sizes={"prefill": 2}, direct={"heads_per_object": 1}) as nodes:
        yield nodes


@pytest.fixture
def watch(gqa: Nodes) -> Iterator[Watch]:
    """In the end both nodes are at rest."""
    watch = Watch(list(gqa.servers.values()))
    yield watch
    watch.check()


@pytest.fixture(scope="module")
def right(farm: Farm) -> Answers:
    """What a whole server without any cache answers (of the same GQA model)."""

    def answer(prompt: list[int], tokens: int) -> list[int]:
        return farm.reference.generate(prompt, tokens).output_ids

    return answer


def hold(nodes: Nodes, conversations: int, turns: int) -> list[Any]:
    """Conversations side by side; each waits until the pool has what it said."""
    (router,) = nodes.routers.values()
    talks = [Conversation("decode", number, "test") for number in range(conversations)]
    done: list[Any] = []
    before = nodes.pool.stored_pages()
    for _ in range(turns):
        with ThreadPoolExecutor(conversations) as pool:
            done += pool.map(lambda talk: talk.ask(router, QUESTION_TOKENS, ANSWER_TOKENS), talks)
        nodes.pool.wait_stored(before + stored_pages(done, PAGE_SIZE), timeout_s=10.0)
    return done


@pytest.mark.usefixtures("watch")
def test_the_next_turn_loads_what_decode_generated_and_answers_like_a_whole_server(
    gqa: Nodes, right: Answers, say: Say
) -> None:
    turns = hold(gqa, conversations=3, turns=3)
    share = generated_share(turns, ANSWER_TOKENS)
    say(f"{share:.1%} of the generated tokens came from the pool")
    for turn in turns:
        assert list(turn.output_ids) == right(list(turn.prompt), ANSWER_TOKENS), turn
    assert share >= 0.9


@pytest.mark.usefixtures("watch")
def test_a_long_answer_reaches_the_pool_while_it_is_generated(gqa: Nodes) -> None:
    (router,) = gqa.routers.values()
    (prompt,) = make_prompts(1, 3 * PAGE_SIZE, seed=51)
    before, seen = gqa.pool.stored_pages(), []

    def look(ids: list[int]) -> None:
        if len(ids) % STRIDE_TOKENS == 0:
            seen.append(gqa.pool.stored_pages() - before)

    router.generate(prompt, 6 * STRIDE_TOKENS, on_part=look)
    # Two objects a page: one per head. The prompt's are there first.
    assert max(seen) >= 2 * (3 + 3 * STRIDE_TOKENS // PAGE_SIZE), seen


@pytest.mark.usefixtures("watch")
def test_many_requests_leave_nothing_behind(gqa: Nodes, say: Say) -> None:
    (router,) = gqa.routers.values()
    prompts = make_prompts(REQUESTS, 40, seed=52)
    answers = router.generate_many(prompts, concurrency=8, max_new_tokens=12, stream=False)
    assert len(answers) == REQUESTS
    assert all(len(answer.output_ids) == 12 for answer in answers)


@pytest.mark.usefixtures("watch")
def test_clients_that_go_away_while_decode_generates_do_not_touch_the_others(
    gqa: Nodes, right: Answers
) -> None:
    (router,) = gqa.routers.values()
    prompts = make_prompts(6, 60, seed=53)

    class GoneError(Exception):
        pass

    def leave(ids: list[int]) -> None:
        if len(ids) > STRIDE_TOKENS + 5:
            raise GoneError

    def ask(number: int) -> list[int] | None:
        try:
            on_part = leave if number % 2 else None
            return router.generate(prompts[number], ANSWER_TOKENS, on_part=on_part).output_ids
        except GoneError:
            return None

    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(ask, range(len(prompts))))
    assert answers[1::2] == [None] * 3
    assert answers[::2] == [right(prompt, ANSWER_TOKENS) for prompt in prompts[::2]]


@pytest.mark.usefixtures("watch")
def test_a_pool_that_stands_still_while_decode_generates_costs_nothing_but_the_pages(
    gqa: Nodes, right: Answers
) -> None:
    (router,) = gqa.routers.values()
    prompts = make_prompts(4, 60, seed=54)
    processes = (gqa.pool.meta, *gqa.pool.members)  # type: ignore[attr-defined]
    timer = threading.Timer(0.3, lambda: [p.send_signal(signal.SIGSTOP) for p in processes])
    timer.start()
    try:
        answers = router.generate_many(prompts, 4, 3 * ANSWER_TOKENS)
    finally:
        timer.cancel()
        timer.join()
        time.sleep(STORE_TIMEOUT_MS / 1e3)  # longer than any store may wait
        for process in processes:
            process.send_signal(signal.SIGCONT)
    assert [a.output_ids for a in answers] == [right(p, 3 * ANSWER_TOKENS) for p in prompts]


def test_a_decode_node_that_is_killed_comes_back_and_the_prefill_node_goes_on(
    gqa: Nodes, right: Answers, say: Say
) -> None:
    (router,) = gqa.routers.values()
    watch = Watch([gqa.prefill])
    prompts = make_prompts(4, 60, seed=55)
    killer = threading.Timer(0.5, gqa.servers["decode"].kill)
    killer.start()
    with pytest.raises(RequestError), ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda prompt: router.generate(prompt, 2000, timeout_s=60), prompts))
    killer.join()
    gqa.restart_decode("decode")
    (again,) = make_prompts(1, 60, seed=56)
    deadline_s = time.monotonic() + 120
    while True:  # the router finds the node again in its own time
        try:
            answer = router.generate(again, ANSWER_TOKENS, timeout_s=30)
            break
        except RequestError as error:
            if time.monotonic() > deadline_s:
                raise
            say(f"not yet: {str(error)[:80]}")
            time.sleep(2)
    assert answer.output_ids == right(again, ANSWER_TOKENS)
    watch.check()


def test_a_pool_that_dies_while_decode_generates_is_not_noticed(gqa: Nodes, right: Answers) -> None:
    (router,) = gqa.routers.values()
    watch = Watch(list(gqa.servers.values()))
    prompts = make_prompts(4, 60, seed=57)
    processes = (gqa.pool.meta, *gqa.pool.members)  # type: ignore[attr-defined]
    timer = threading.Timer(0.3, lambda: [p.send_signal(signal.SIGKILL) for p in processes])
    timer.start()
    answers = router.generate_many(prompts, 4, 3 * ANSWER_TOKENS)
    timer.join()
    assert [a.output_ids for a in answers] == [right(p, 3 * ANSWER_TOKENS) for p in prompts]
    watch.check(CALL_RETURNS_S)


def test_mla_nodes_share_pages_whatever_their_tp_size_and_retraction_loses_nothing(
    farm: Farm, tmp_path: Path, say: Say
) -> None:
    farm.clear()
    small = {"decode": ("--max-total-tokens", "1536")}
    with pair(tmp_path, "mla", say, tp_sizes={"decode": 2}, node_args=small) as nodes:
        turns = hold(nodes, conversations=6, turns=2)
        log = nodes.servers["decode"].log_text()
        model = nodes.model
    assert "retract" in log.lower(), "the decode node was meant to run out of memory"
    farm.clear()
    share = generated_share(turns, ANSWER_TOKENS)
    say(f"{share:.1%} of the generated tokens came from the pool")
    with whole_server(model, tmp_path, say) as server:
        for turn in turns:
            right = server.generate(turn.prompt, ANSWER_TOKENS).output_ids
            assert list(turn.output_ids) == right, turn
    assert share >= 0.9


def whole_server(model: Path, folder: Path, say: Say) -> Any:
    """One server that caches nothing."""
    return SGLangServer(
        model,
        ["--page-size", str(PAGE_SIZE), "--disable-radix-cache"],
        name="no cache",
        log_path=folder / "no_cache.log",
        progress=say,
    )
