# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Two processes, one gloo group: each runs the same function as one rank of every instance.

Owns the processes, the group, SGLang's rank-consensus checker in them (a rank that takes another
branch ends its process) and the watchdog: a pair that does not answer in time is dumped and killed.
What the ranks do is in rank_scenarios.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import os
import sys
import traceback
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch.multiprocessing as multiprocessing

RANKS = 2
START_S = 240.0
SCENARIOS = "tests.integration.rank_scenarios"


class RankFailure(AssertionError):
    """A rank raised, died or hung; the message carries its traceback."""


def _rank_main(rank: int, folder: str, pipe: Connection) -> None:
    """One rank: answers (function name, arguments) with ("ok", result) or ("failed", traceback)."""
    os.environ |= {
        "SGLANG_ENABLE_RANK_CONSENSUS_CHECKER": "1",
        "SGLANG_USE_CPU_ENGINE": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    warnings.simplefilter("ignore")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    group = dist.new_group(list(range(RANKS)), backend="gloo")
    from sglang.srt.utils import rank_consensus_checker

    rank_consensus_checker.configure([SimpleNamespace(cpu_group=group)])
    scenarios = importlib.import_module(SCENARIOS)
    pipe.send(("ok", rank_consensus_checker.enabled()))
    while (message := pipe.recv()) is not None:
        name, arguments, limit_s = message
        faulthandler.dump_traceback_later(limit_s, file=sys.__stderr__)
        try:
            answer = ("ok", getattr(scenarios, name)(rank, group, Path(folder), **arguments))
        except BaseException:  # noqa: BLE001  a process root: the test re-raises it
            answer = ("failed", traceback.format_exc())
        faulthandler.cancel_dump_traceback_later()
        pipe.send(answer)
    # Without groups to destroy in order: a rank that failed would wait for the other.
    os._exit(0)


class RankPair:
    """Started once, used by many tests.

    Args:
        folder: for the rendezvous and for pools.
    """

    def __init__(self, folder: Path) -> None:
        self.usable = True
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(RANKS):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_rank_main, args=(rank, str(folder), theirs), name=f"rank-{rank}"
            )
            process.daemon = True
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self.checked = all(self._collect("start", START_S))

    def run(self, name: str, limit_s: float = 90.0, **arguments: Any) -> list[Any]:
        """Run a scenario on both ranks; returns what each one returned.

        Raises:
            RankFailure: a rank did not return.
        """
        for pipe in self._pipes:
            pipe.send((name, arguments, limit_s))
        return self._collect(name, limit_s + 5.0)

    def _collect(self, what: str, limit_s: float) -> list[Any]:
        results, failures = [], []
        for rank, pipe in enumerate(self._pipes):
            try:
                # Once one rank has failed, the other waits for it in a collective.
                answered = pipe.poll(5.0 if failures else limit_s)
                state, value = pipe.recv() if answered else ("hung", f"no answer in {limit_s} s")
            except EOFError:
                state, value = "died", f"exit code {self._processes[rank].exitcode}"
            if state == "ok":
                results.append(value)
            else:
                failures.append(f"rank {rank} {state} in {what}: {value}")
        if failures:
            self.close()
            raise RankFailure("\n".join(failures))
        return results

    def close(self) -> None:
        """End the processes, by force where they do not answer."""
        self.usable = False
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            with contextlib.suppress(OSError):  # it may be gone already
                pipe.send(None)
            process.join(2.0)
            if process.is_alive():
                process.kill()
                process.join(10.0)
            pipe.close()
