# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""What a request costs on these two servers, from probes: the file that `plan --costs` takes.

Owns the probes and the fit. Servers are asked one by one and both at once, as often: two that
compute share memory and caches of this machine, and in the replay they do so about half the time.
What is fitted is time to first token on an idle server, so it holds all of SGLang and HTTP too.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from sglang_cpu.client import Generation, SGLangClient
from two_instances.cluster import Cluster
from two_instances.run import make_prompts

from ascend_direct.cli.planning.costs import Costs

SETTLE_S = 20.0
# Share of the probes.
MOST_MISSED = 0.1


class NotAsExpected(RuntimeError):
    """A probe did not find what it should: what it measured is something else."""


@dataclass(frozen=True)
class Probe:
    """One request: tokens by where they came from, and seconds to its first token."""

    kind: str
    computed_tokens: int
    device_tokens: int
    loaded_tokens: int
    ttft_s: float


def ask(server: SGLangClient, tokens: Sequence[int]) -> Generation:
    """One token of an answer, and where the prompt came from."""
    return server.generate(tokens, 1, return_cached_tokens_details=True)


def probe(kind: str, got: Generation) -> Probe:
    """What an answer tells."""
    device = got.cached_tokens_details.get("device", 0)
    loaded = got.cached_tokens_details.get("storage", 0)
    ttft_s = got.total_s if got.ttft_s is None else got.ttft_s
    return Probe(kind, got.prompt_tokens - device - loaded, device, loaded, ttft_s)


class Calibration:
    """Probes of both servers."""

    def __init__(self, cluster: Cluster, page_size: int) -> None:
        self._cluster = cluster
        self._servers = [cluster.servers[name] for name in ("A", "B")]
        self._page_size = page_size
        self._seed = 10_000
        self.probes: list[Probe] = []
        self._missed: list[tuple[str, Probe]] = []
        self.stores_s: list[float] = []
        self._pool = ThreadPoolExecutor(len(self._servers))

    def warm_up(self, tokens: int) -> None:
        """First requests compile and allocate; they are not counted."""
        for _ in range(2):
            self.length(tokens)
        self.probes.clear()
        self.stores_s.clear()

    def length(self, tokens: int) -> None:
        """All kinds of request of one length: to A, to B, to both at once.

        Raises:
            NotAsExpected: more than a few hits were none.
        """
        for asked in ([0], [1], [0, 1]):
            prompts = self._prompts(len(asked), tokens)
            self._ask("cold", asked, prompts)
            self._settle()
            self._ask("device", asked, prompts)
            ends = self._prompts(len(asked), tokens - tokens // 2)
            halves = [p[: tokens // 2] + end for p, end in zip(prompts, ends, strict=True)]
            self._ask("half", asked, halves)
            self._settle()
            self._ask("pool", [1 - server for server in asked], prompts)

    def _prompts(self, count: int, tokens: int) -> list[list[int]]:
        self._seed += 1
        return make_prompts(count, tokens, seed=self._seed)

    def _ask(self, kind: str, asked: Sequence[int], prompts: Sequence[Sequence[int]]) -> None:
        servers = [self._servers[server] for server in asked]
        found = [probe(kind, got) for got in self._pool.map(ask, servers, prompts)]
        pages = (len(prompts[0]) - 1) // self._page_size
        expected = {"cold": 0, "half": len(prompts[0]) // 2 // self._page_size}
        for one in found:
            hit, other = one.device_tokens, one.loaded_tokens
            if kind == "pool":
                hit, other = other, hit
            if hit == expected.get(kind, pages) * self._page_size and not other:
                self.probes.append(one)
            else:  # a full pool that makes room may refuse a page
                self._missed.append((kind, one))
        if len(self._missed) > MOST_MISSED * (len(self.probes) + len(self._missed)) + 1:
            kind, one = self._missed[-1]
            raise NotAsExpected(f"a probe that should be {kind} was {one}, and not the first")

    def _settle(self) -> None:
        """Wait until what was computed is in the pool, and note how long that took."""
        begin_s = time.monotonic()
        held, since_s = self._cluster.pool.stored_pages(), begin_s
        while time.monotonic() - since_s < 0.3:
            time.sleep(0.02)
            now = self._cluster.pool.stored_pages()
            if now != held:
                held, since_s = now, time.monotonic()
            if time.monotonic() - begin_s > SETTLE_S:
                raise NotAsExpected(f"stores have not ended {SETTLE_S:g} s after a prompt")
        self.stores_s.append(since_s - begin_s)

    def costs(self, source: str = "") -> Costs:
        """The lines through all probes."""
        request_ms, compute_us, cached_us, pair_ns = fit_compute(self.probes)
        load_fixed_ms, load_us = fit_loads(self.probes)
        store_fixed_ms = 1e3 * statistics.median(self.stores_s)
        return Costs(
            source=source,
            request_ms=request_ms,
            compute_us_per_token=compute_us,
            cached_us_per_token=cached_us,
            pair_ns=pair_ns,
            whole_attention=True,
            load_fixed_ms=load_fixed_ms,
            load_us_per_token=load_us,
            store_fixed_ms=store_fixed_ms,
        )

    def told(self) -> list[dict[str, Any]]:
        """For the result file."""
        return [asdict(one) for one in self.probes]


def fit_compute(probes: Sequence[Probe]) -> tuple[float, float, float, float]:
    """(ms, µs per computed token, µs per cached token, ns per pair) of requests without a load."""
    without = [p for p in probes if not p.loaded_tokens]
    grouped = _medians(without)
    columns = []
    for computed, device, _ in grouped:
        whole = computed + device
        columns.append((1e-3, 1e-6 * computed, 1e-6 * device, 1e-9 * whole * whole / 2))
    fitted = not_negative(np.array(columns), np.array(list(grouped.values())))
    return fitted[0], fitted[1], fitted[2], fitted[3]


def fit_loads(probes: Sequence[Probe]) -> tuple[float, float]:
    """(ms, µs per token): how much later a pool hit answers than the same as a device hit."""
    device = {
        (computed, cached): seconds
        for (computed, cached, loaded), seconds in _medians(probes).items()
        if not loaded
    }
    rows, extra_s = [], []
    for (computed, _, loaded), seconds in _medians(probes).items():
        if loaded and (computed, loaded) in device:
            rows.append((1e-3, 1e-6 * loaded))
            extra_s.append(max(seconds - device[computed, loaded], 1e-4))
    fitted = not_negative(np.array(rows), np.array(extra_s))
    return fitted[0], fitted[1]


def _medians(probes: Sequence[Probe]) -> dict[tuple[int, int, int], float]:
    by_case: dict[tuple[int, int, int], list[float]] = {}
    for p in probes:
        key = (p.computed_tokens, p.device_tokens, p.loaded_tokens)
        by_case.setdefault(key, []).append(p.ttft_s)
    return {key: statistics.median(values) for key, values in by_case.items()}


def not_negative(rows: Any, values: Any) -> list[float]:
    """Least squares of relative errors with no coefficient below 0: few columns, so all subsets."""
    scaled, ones = rows / values[:, None], np.ones(len(values))
    count = rows.shape[1]
    best, least = [0.0] * count, float("inf")
    for size in range(1, count + 1):
        for chosen in itertools.combinations(range(count), size):
            found = np.linalg.lstsq(scaled[:, chosen], ones, rcond=None)[0]
            error = float(((scaled[:, chosen] @ found - ones) ** 2).sum())
            if (found >= 0).all() and error < least:
                best, least = [0.0] * count, error
                for place, value in zip(chosen, found, strict=True):
                    best[place] = float(value)
    return best
