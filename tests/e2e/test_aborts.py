# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Requests that end early and caches flushed in flight: right answers after, no slot lost.

Every test ends with `cluster`'s own check: zero used slots, no leak reported by SGLang.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import requests
from sglang_cpu.client import Generation, RequestError
from sglang_cpu.server import SGLangServer
from two_instances.cluster import Cluster
from two_instances.run import ask

from .farm import Farm, used_tokens
from .faults import FaultyPool

pytestmark = pytest.mark.parametrize("cluster", ["faults"], indirect=True)

PROMPT_TOKENS = 800
LONG_ANSWER = 3000
# This many long answers want more slots than there are, so the last ones wait.
CROWD = 16
WAIT_S = 60.0


def wait_for(what: str, condition: Callable[[], bool], timeout_s: float = WAIT_S) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {timeout_s:.0f} s: {what}"
        time.sleep(0.05)


def some_prompt(dice: random.Random, tokens: int = PROMPT_TOKENS) -> list[int]:
    return [dice.randint(3, 1000) for _ in range(tokens)]


def store_with_a(cluster: Cluster, farm: Farm, prompts: list[list[int]]) -> None:
    """A computes the prompts; afterwards the pool has them."""
    before = cluster.pool.stored_pages()
    for prompt in prompts:
        ask(cluster.servers["A"], prompt, 1)
    pages = before + sum(len(prompt) // farm.page_size for prompt in prompts)
    assert cluster.pool.wait_stored(pages) >= pages


def outcome(request: Future[Generation]) -> str:
    """`abort`, or how else the request ended."""
    try:
        return str(request.result(WAIT_S).finish_reason.get("type"))
    except RequestError as error:
        return f"HTTP {error.status}"


def assert_serves(cluster: Cluster, farm: Farm, name: str, prompt: list[int]) -> Generation:
    """The server gives the right answer to this prompt now."""
    got = ask(cluster.servers[name], prompt, 4)
    assert got.output_ids == ask(farm.reference, prompt, 4).output_ids
    return got


def start(
    pool: ThreadPoolExecutor, server: SGLangServer, prompt: list[int], rid: str, tokens: int
) -> Future[Generation]:
    return pool.submit(server.generate, prompt, tokens, rid=rid)


@contextmanager
def requests_to(server: SGLangServer, count: int) -> Iterator[ThreadPoolExecutor]:
    """Threads for requests; when the test fails, the requests end with it."""
    with ThreadPoolExecutor(count) as pool:
        try:
            yield pool
        except BaseException:
            server.abort_all()
            raise


def how_it_ends(server: SGLangServer, prompt: list[int], rid: str) -> str:
    """A request whose answer may lack the counts that SGLangClient reads: it never ran."""
    sampling = {"temperature": 0, "ignore_eos": True, "max_new_tokens": LONG_ANSWER}
    body = {"input_ids": prompt, "rid": rid, "sampling_params": sampling}
    answer = requests.post(f"{server.url}/generate", json=body, timeout=WAIT_S).json()
    return str(answer["meta_info"]["finish_reason"]["type"])


def running_and_waiting(server: SGLangServer) -> tuple[int, int]:
    """Requests of a server, as SGLang reports them."""
    (load,) = json.loads(server.get_text("/v1/loads"))["loads"]
    return load["num_running_reqs"], load["num_waiting_reqs"]


def pool_of(cluster: Cluster) -> FaultyPool:
    assert isinstance(cluster.pool, FaultyPool)
    return cluster.pool


def test_a_request_aborted_while_it_runs_on_loaded_pages_frees_them(
    cluster: Cluster, farm: Farm, dice: random.Random
) -> None:
    b, prompt = cluster.servers["B"], some_prompt(dice)
    store_with_a(cluster, farm, [prompt])
    with requests_to(b, 1) as pool:
        request = start(pool, b, prompt, "running", LONG_ANSWER)
        wait_for("the request holds slots", lambda: used_tokens(b) > PROMPT_TOKENS)
        b.abort("running")
        assert outcome(request) == "abort"
    assert assert_serves(cluster, farm, "B", prompt).cached_tokens > 0


def test_a_request_aborted_during_its_load_leaves_the_loaded_pages_sound(
    cluster: Cluster, farm: Farm, dice: random.Random
) -> None:
    b, prompt = cluster.servers["B"], some_prompt(dice)
    store_with_a(cluster, farm, [prompt])
    faults = pool_of(cluster).faults
    loads = faults.count("get", "delay")
    with faults.on("get", "delay 1.5"), requests_to(b, 1) as pool:
        request = start(pool, b, prompt, "loading", LONG_ANSWER)
        wait_for("the load has begun", lambda: faults.count("get", "delay") > loads)
        b.abort("loading")
        assert outcome(request) == "abort"
    assert assert_serves(cluster, farm, "B", prompt).cached_tokens > 0


def test_a_request_aborted_during_a_load_that_is_late_gives_its_slots_back_in_the_end(
    cluster: Cluster, farm: Farm, dice: random.Random
) -> None:
    b, prompt = cluster.servers["B"], some_prompt(dice)
    store_with_a(cluster, farm, [prompt])
    faults = pool_of(cluster).faults
    loads = faults.count("get", "hang")
    with faults.on("get", "hang"), requests_to(b, 1) as pool:
        request = start(pool, b, prompt, "late", LONG_ANSWER)
        wait_for("the load has begun", lambda: faults.count("get", "hang") > loads)
        b.abort("late")
        assert outcome(request) == "abort"
        withheld = PROMPT_TOKENS // farm.page_size * farm.page_size - farm.page_size
        assert used_tokens(b) >= withheld, "slots the hanging call may still write are not free"
        assert_serves(cluster, farm, "B", prompt)
    assert_serves(cluster, farm, "B", prompt)


def test_a_request_aborted_while_it_waits_is_gone_and_the_next_one_loads(
    cluster: Cluster, farm: Farm, dice: random.Random
) -> None:
    b, waiting = cluster.servers["B"], some_prompt(dice)
    store_with_a(cluster, farm, [waiting])
    crowd = [some_prompt(dice, 20) for _ in range(CROWD)]
    with requests_to(b, len(crowd) + 1) as pool:
        others = [pool.submit(how_it_ends, b, p, f"crowd-{i}") for i, p in enumerate(crowd)]
        wait_for("all have come", lambda: sum(running_and_waiting(b)) == CROWD)
        assert running_and_waiting(b)[1] > 0, "the crowd leaves room"
        request = pool.submit(how_it_ends, b, waiting, "waiting")
        wait_for("it waits", lambda: sum(running_and_waiting(b)) == CROWD + 1)
        b.abort("waiting")
        assert request.result(WAIT_S) == "abort"
        wait_for("it is gone", lambda: sum(running_and_waiting(b)) == CROWD)
        b.abort_all()
        assert {other.result(WAIT_S) for other in others} == {"abort"}
    assert assert_serves(cluster, farm, "B", waiting).cached_tokens > 0


def test_a_flush_in_flight_waits_for_requests_and_the_pool_keeps_its_pages(
    cluster: Cluster, farm: Farm, dice: random.Random
) -> None:
    b, prompts = cluster.servers["B"], [some_prompt(dice) for _ in range(4)]
    store_with_a(cluster, farm, prompts)
    truth = [ask(farm.reference, prompt, 64).output_ids for prompt in prompts]
    faults = pool_of(cluster).faults
    loads = faults.count("get", "delay")
    with faults.on("get", "delay 0.5"), requests_to(b, len(prompts)) as pool:
        requests = [start(pool, b, p, f"flush-{i}", 64) for i, p in enumerate(prompts)]
        wait_for("a load has begun", lambda: faults.count("get", "delay") > loads)
        b.flush()
        assert [request.result(WAIT_S).output_ids for request in requests] == truth
    b.flush()
    assert used_tokens(b) == 0
    again = [ask(b, prompt, 64) for prompt in prompts]
    assert [answer.output_ids for answer in again] == truth
    assert all(answer.cached_tokens_details["storage"] > 0 for answer in again)


def test_a_flush_with_stores_queued_drops_them_and_keeps_answering(
    cluster: Cluster, farm: Farm, dice: random.Random
) -> None:
    a, prompts = cluster.servers["A"], [some_prompt(dice) for _ in range(5)]
    truth = [ask(farm.reference, prompt, 4).output_ids for prompt in prompts]
    faults = pool_of(cluster).faults
    puts = faults.count("put", "delay")
    with faults.on("put", "delay 1"):
        assert [ask(a, prompt, 4).output_ids for prompt in prompts] == truth
        wait_for("a store has begun", lambda: faults.count("put", "delay") > puts)
        a.flush()
        assert used_tokens(a) == 0
        assert [ask(a, prompt, 4).output_ids for prompt in prompts] == truth
    assert [ask(cluster.servers["B"], p, 4).output_ids for p in prompts] == truth
