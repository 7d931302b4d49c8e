# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Admission by cost: learnt right, safe while it knows nothing, and it does not flutter."""

from __future__ import annotations

import itertools
import random

import pytest

from ascend_direct.admission import ENOUGH, NEVER_TOKENS, TRIAL_ONE_IN, Admission, CostLine


class Machine:
    """Computes and loads with given costs, in seconds per token."""

    def __init__(self, compute: float, fixed: float, load: float, noise: float = 0.0) -> None:
        self.compute, self.fixed, self.load, self._noise = compute, fixed, load, noise
        self.admission = Admission()
        self._random = random.Random(7)

    def _noisy(self, seconds: float) -> float:
        return seconds * (1 + self._noise * self._random.uniform(-1, 1))

    def computes(self, tokens: int) -> None:
        self.admission.computed(tokens, self._noisy(0.002 + self.compute * tokens))

    def loads(self, tokens: int) -> None:
        self.admission.loaded(tokens, self._noisy(self.fixed + self.load * tokens))

    def learns(self, times: int = 40) -> int:
        for _ in range(times):
            self.computes(self._random.randrange(200, 4000))
            self.loads(self._random.randrange(200, 4000))
        return self.admission.least_tokens


@pytest.mark.parametrize(
    ("compute", "fixed", "load", "least"),
    [
        (100e-6, 10e-3, 2e-6, 102),
        (100e-6, 50e-3, 50e-6, 1000),
        (20e-6, 1e-3, 10e-6, 100),
    ],
)
def test_the_threshold_is_where_both_cost_the_same(compute, fixed, load, least) -> None:
    assert Machine(compute, fixed, load).learns() == pytest.approx(least, rel=0.02)
    assert Machine(compute, fixed, load, noise=0.1).learns(200) == pytest.approx(least, rel=0.5)


def test_a_pool_slower_than_computing_is_not_used_but_for_trials() -> None:
    machine = Machine(compute=10e-6, fixed=0, load=40e-6)
    assert machine.learns() == NEVER_TOKENS
    admitted = sum(machine.admission.floor_tokens(f"r{n}") < 100_000 for n in range(3200))
    assert 0.5 < admitted / (3200 / TRIAL_ONE_IN) < 1.5


def test_nothing_is_refused_before_both_costs_are_known() -> None:
    machine = Machine(compute=10e-6, fixed=1, load=1)
    for _ in range(50):
        machine.loads(1000)
    for _ in range(ENOUGH - 1):
        machine.computes(1000)
    assert not any(machine.admission.floor_tokens(f"r{n}") for n in range(100))
    machine.computes(1000)
    assert any(machine.admission.floor_tokens(f"r{n}") for n in range(100))


def test_a_pool_that_has_become_fast_is_found_by_trials() -> None:
    machine = Machine(compute=10e-6, fixed=5e-3, load=40e-6)
    machine.learns()
    machine.fixed, machine.load = 1e-3, 1e-6
    machine.learns(200)
    assert machine.admission.least_tokens < 200


def test_one_call_that_hangs_does_not_throw_it() -> None:
    machine = Machine(compute=100e-6, fixed=10e-3, load=2e-6)
    before = machine.learns(100)
    machine.admission.loaded(1000, 60.0)
    assert machine.admission.least_tokens < 3 * before
    machine.learns(200)
    assert machine.admission.least_tokens == pytest.approx(before, rel=0.3)


def test_costs_that_are_nearly_equal_do_not_make_it_flutter() -> None:
    machine = Machine(compute=20e-6, fixed=10e-3, load=5e-6, noise=0.3)
    machine.learns(200)
    seen = []
    for _ in range(300):
        machine.learns(1)
        seen.append(machine.admission.least_tokens)
    changes = sum(a != b for a, b in itertools.pairwise(seen))
    assert changes < 30
    assert max(seen) < 4 * max(1, min(seen))


def test_samples_of_one_length_are_taken_for_slope() -> None:
    line = CostLine()
    for _ in range(10):
        line.add(1000, 0.5)
    assert line.fit() == (0.0, pytest.approx(0.5e-3))
