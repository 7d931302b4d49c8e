# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""What a pool that stops in the middle of traffic costs in time to first token.

Owns the measurement: the same prompts to a server on the pool and to two servers without the
plugin, in turns of changing order so that the machine's noise hits all alike. How much the two
without the plugin differ is what this machine cannot tell apart.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from sglang_cpu.server import SGLangServer
from two_instances.cluster import Cluster, MemcachePool
from two_instances.run import ask, make_prompts

from .report import percentiles_ms

PROMPT_TOKENS = 700
SERVER_ARGS = ("--page-size", "16", "--max-total-tokens", "16384")
WITH, WITHOUT = "plugin", ("no plugin 1", "no plugin 2")
# Requests to each server before the pool stops.
HEALTHY_SHARE = 0.25
TARGET = 1.1

Times = dict[str, list[float]]


def measure(
    model: Path, folder: Path, requests: int, how: str, seed: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Ask, stop the pool on the way, ask on; `how` is `stop` (SIGSTOP) or `kill`."""
    pool = MemcachePool(members=3, member_size="64MB")
    with ExitStack() as stack:
        plain = {
            name: SGLangServer(
                model,
                SERVER_ARGS,
                name=name,
                log_path=folder / "logs" / f"{name.replace(' ', '_')}.log",
                progress=say,
            )
            for name in WITHOUT
        }
        for server in plain.values():
            stack.callback(server.stop)
            server.start()
        cluster = stack.enter_context(
            Cluster(
                pool,
                model,
                SERVER_ARGS,
                servers=(WITH,),
                reference=False,
                log_dir=folder / "logs",
                progress=say,
            )
        )
        for server in plain.values():
            server.wait_ready()
        asked = _Rounds({WITH: cluster.servers[WITH], **plain}, requests, seed)
        healthy = asked.rounds(max(5, round(requests * HEALTHY_SHARE)))
        say(f"pool: {how}")
        with _stopped(pool, how):
            first = asked.rounds(1)
            stopped = asked.rounds(requests)
    return _result(how, healthy, first, stopped, asked.problems)


class _Rounds:
    """Asks each prompt of all servers; the answers must agree."""

    def __init__(self, servers: dict[str, SGLangServer], requests: int, seed: int) -> None:
        self._servers = servers
        self._prompts = iter(make_prompts(2 * requests + 20, PROMPT_TOKENS, seed))
        self._dice = random.Random(seed)
        self.problems: list[str] = []
        self.rounds(4)  # first requests pay for what later ones do not

    def rounds(self, count: int) -> Times:
        times: Times = {name: [] for name in self._servers}
        for _ in range(count):
            prompt, answers = next(self._prompts), {}
            for name in self._dice.sample(list(self._servers), len(self._servers)):
                got = ask(self._servers[name], prompt, 1)
                times[name].append(got.ttft_s or got.total_s)
                answers[name] = got.output_ids
            if len({tuple(ids) for ids in answers.values()}) > 1:
                self.problems.append(f"answers differ: {answers}")
        return times


@contextmanager
def _stopped(pool: MemcachePool, how: str) -> Iterator[None]:
    """The whole pool stands still, or is dead, inside the block."""
    processes = (pool.meta, *pool.members)
    for process in processes:
        process.send_signal(signal.SIGSTOP if how == "stop" else signal.SIGKILL)
    try:
        yield
    finally:
        for process in processes:
            process.send_signal(signal.SIGCONT)


def _result(
    how: str, healthy: Times, first: Times, stopped: Times, problems: list[str]
) -> dict[str, Any]:
    def p99(name: str, times: Times) -> float:
        return percentiles_ms(times[name])["p99"]

    ratio = {
        "plugin ÷ no plugin 1": _ratio(stopped, WITH, WITHOUT[0]),
        "plugin ÷ no plugin 2": _ratio(stopped, WITH, WITHOUT[1]),
        "no plugin 2 ÷ no plugin 1 (noise)": _ratio(stopped, WITHOUT[1], WITHOUT[0]),
    }
    slowest_ms = max(p99(name, stopped) for name in WITHOUT)
    met = p99(WITH, stopped) <= TARGET * slowest_ms
    if not met:
        problems = [*problems, f"p99 {p99(WITH, stopped)} ms, without the plugin {slowest_ms} ms"]
    return {
        "problems": problems,
        "interrupted": False,
        "pool": how,
        "requests_per_server": len(stopped[WITH]),
        "ttft_ms_pool_healthy": {name: percentiles_ms(t) for name, t in healthy.items()},
        "ttft_ms_first_request_after": {n: round(t[0] * 1e3, 1) for n, t in first.items()},
        "ttft_ms_pool_stopped": {name: percentiles_ms(t) for name, t in stopped.items()},
        "ratios_pool_stopped": ratio,
    }


def _ratio(times: Times, above: str, below: str) -> dict[str, float]:
    over, under = percentiles_ms(times[above]), percentiles_ms(times[below])
    return {p: round(over[p] / under[p], 3) for p in ("p50", "p90", "p99")}
