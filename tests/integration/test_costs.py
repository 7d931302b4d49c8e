# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""`admission: cost` on SGLang's real tree: what is measured, and which hits are left alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from ascend_direct.admission import ENOUGH, TRIAL_ONE_IN, Admission
from ascend_direct.device import Device
from ascend_direct.integration.costs import Costs

from .instance import Instance
from .prompts import counts, evict_all, prompt, serve_and_store

CONFIG = {"admission": "cost"}
MODES = ("sync", "lookahead")


def learn(a: Instance, b: Instance, *, load_ms: float, compute_us: float) -> None:
    """B serves prompts of several lengths, computed by itself and loaded, until it knows both.

    Args:
        load_ms: of a load, whatever its length.
        compute_us: of a token.
    """
    b.store.faults["get"].delay_ms = load_ms
    compute = b._compute

    def slowly(served: Any, begin: int, end: int) -> None:
        time.sleep(compute_us * (end - begin) / 1e6)
        compute(served, begin, end)

    b._compute = slowly  # type: ignore[method-assign]
    for number in range(ENOUGH):
        length = 120 + 16 * number
        b.serve(prompt(length, seed=100 + number))
        serve_and_store(a, prompt(length, seed=200 + number))
        b.serve(prompt(length, seed=200 + number), rid=name(number))
        evict_all(b)
        evict_all(a)


def name(number: int, *, trial: bool = False) -> str:
    """A request's name: one that is a trial, or one that is none."""
    admission = Admission()
    admission._least_tokens = 1
    names = (f"{number}-{n}" for n in range(100 * TRIAL_ONE_IN))
    return next(rid for rid in names if (admission.floor_tokens(rid) == 0) is trial)


def hit(a: Instance, b: Instance, seed: int, rid: str) -> int:
    """Tokens of A's prompt that B has from the pool."""
    tokens = prompt(250, seed=seed)
    serve_and_store(a, tokens)
    before = counts(b)["load_pages"]
    b.serve(tokens, rid=rid)
    return 16 * (counts(b)["load_pages"] - before)


@pytest.mark.parametrize("load_mode", MODES)
def test_a_pool_slower_than_computing_is_left_alone_but_for_trials(
    make: Callable[..., Instance], load_mode: str
) -> None:
    a, b = make(), make(config={**CONFIG, "load_mode": load_mode})
    learn(a, b, load_ms=60, compute_us=10)
    assert counts(b)["loads"] == ENOUGH
    assert hit(a, b, 1, name(901)) == 0
    assert counts(b)["hits_not_worth"] > 0
    assert hit(a, b, 2, name(902, trial=True)) == 240
    shown: dict[str, int] = {}
    b.controller.metrics.show = shown.update  # type: ignore[method-assign]
    b.controller.show_levels()
    assert shown["least_load_tokens"] > 250


@pytest.mark.parametrize("load_mode", MODES)
def test_a_pool_faster_than_computing_is_used(
    make: Callable[..., Instance], load_mode: str
) -> None:
    a, b = make(), make(config={**CONFIG, "load_mode": load_mode})
    learn(a, b, load_ms=1, compute_us=200)
    assert hit(a, b, 1, name(901)) == 240
    assert counts(b)["hits_not_worth"] == 0


def test_without_the_option_nothing_is_measured(make: Callable[..., Instance]) -> None:
    assert make().controller.costs is None


def test_a_batch_with_running_requests_is_not_taken_for_a_prefill() -> None:
    costs, calls = Costs(Device("cpu"), None, 16), []
    costs._admission.computed = lambda *sample: calls.append(sample)  # type: ignore[method-assign]

    class Request:
        extend_len = 100

        def __init__(self, *output_ids: int) -> None:
            self.output_ids = output_ids

    costs.prefill_begins()
    costs.forward_launched([Request(), Request(7)])
    costs.forward_launched([Request()])  # a forward whose batch nobody announced: decoding
    assert calls == []
    costs.prefill_begins()
    costs.forward_launched([Request(), Request()])
    assert [tokens for tokens, _ in calls] == [200]


def test_a_prefill_is_counted_once_its_forward_has_ended() -> None:
    costs, calls = Costs(Device("cpu"), None, 16), []
    ended: dict[str, float] = {}
    costs._clock.seconds = lambda begin, end: ended.get("s")  # type: ignore[method-assign]
    costs._admission.computed = lambda *sample: calls.append(sample)  # type: ignore[method-assign]
    prefill = type("Request", (), {"extend_len": 64, "output_ids": []})
    for _ in range(2):
        costs.prefill_begins()
        costs.forward_launched([prefill])
    assert calls == []
    ended["s"] = 0.25
    costs.forward_launched([])
    assert calls == [(64, 0.25), (64, 0.25)]
