# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Clients leave at any moment: nothing stays pinned, withheld or half stored."""

from __future__ import annotations

import pytest

from .audit import audit, drain
from .prompts import prompt, serve_and_store
from .served import Phase

CORES = ("rust", "python")
TOKENS = prompt(200)


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("hit", [True, False])
@pytest.mark.parametrize("phase", ["new", "matched", "chunked", "forward", "running", "retracted"])
def test_an_abort_in_any_phase_leaks_nothing(make, core, hit, phase) -> None:
    a, b = make(core=core), make(core=core)
    serve_and_store(a, TOKENS)
    longer = (TOKENS if hit else prompt(200, seed=1)) + prompt(150, seed=2)
    served = b.submit(longer, new_tokens=8)
    if phase == "matched":
        b.match(served)
    elif phase == "chunked":
        b.prefill(served, chunk=48)
        b.prefill(served, chunk=48)
        assert served.phase is Phase.CHUNKED
    elif phase == "forward":
        b.prefill(served, abort=True)
        assert served.phase is Phase.DONE
    elif phase in ("running", "retracted"):
        b.prefill(served)
        b.decode(served)
        if phase == "retracted":
            b.retract(served)
    audit(b)
    if served.phase is not Phase.DONE:
        b.abort(served)
    audit(b)
    drain(b)
    audit(b)
    assert b.tree.linker.hit_markers == {}
    again = serve_and_store(b, longer)
    assert again.tokens[:350] == longer


def test_an_abort_while_its_store_runs_keeps_the_pin_until_the_store_ends(make) -> None:
    a = make()
    a.store.faults["put"].hold()
    served = a.submit(TOKENS, new_tokens=8)
    a.prefill(served, chunk=64)
    a.prefill(served, chunk=64)
    a.abort(served)
    audit(a)
    assert a.tree.protected_size() == 64
    a.store.faults["put"].release()
    drain(a)
    assert a.tree.protected_size() == 0
