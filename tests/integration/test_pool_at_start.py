# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""A pool that is not there when the server starts: `on_pool_unavailable`."""

from __future__ import annotations

import time

import pytest

from ascend_direct.config import DirectConfig
from ascend_direct.errors import StoreUnavailable
from ascend_direct.integration import launch
from tests.waiting import eventually

from ..fakes.memory_store import MemoryStore
from .launching import command_line, resolved, with_flag
from .prompts import counts, evict_all, prompt, serve_and_store

TOKENS = prompt(200)
AWAY = "nobody listens at tcp://10.0.0.1:5000: start the MetaService of the pool."


class _Away(MemoryStore):
    def unreachable(self) -> str:
        return AWAY


@pytest.fixture
def pool_away(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """While `away`, no instance's store can be opened."""
    state = {"away": True}
    opens = MemoryStore.open

    def open_if_there(self, context) -> None:
        if state["away"]:
            raise StoreUnavailable("connect", AWAY)
        opens(self, context)

    monkeypatch.setattr(MemoryStore, "open", open_if_there)
    monkeypatch.setattr("ascend_direct.store.attach.FIRST_PAUSE_S", 0.01)
    return state


def test_by_default_the_launcher_ends_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "choose_store", lambda config: _Away())
    problems = launch._store_problems(DirectConfig.load({}, {}), "cpu")
    assert problems == [AWAY]


def test_with_degrade_the_launcher_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "choose_store", lambda config: _Away())
    monkeypatch.setenv("ASCEND_DIRECT_ACTIVE", "")
    assert resolved(command_line(*with_flag({"on_pool_unavailable": "degrade"})))


def test_by_default_a_scheduler_ends_too(make, pool_away) -> None:
    with pytest.raises(StoreUnavailable, match="start the MetaService"):
        make()


def test_a_server_that_started_without_its_pool_serves_and_uses_it_when_it_appears(
    make, pool_away, capfd
) -> None:
    pool_away["away"] = False
    a = make()
    first = serve_and_store(a, TOKENS)
    pool_away["away"] = True
    begin_s = time.monotonic()
    b = make(config={"on_pool_unavailable": "degrade", "write_policy": "off"})
    assert time.monotonic() - begin_s < 10
    said = f"starting without the pool, attaching when it appears: connect: {AWAY}"
    assert said in capfd.readouterr().err
    for _ in range(5):
        served = serve_and_store(b, TOKENS)
        assert (served.tokens, served.tiers["storage"]) == (first.tokens, 0)
        evict_all(b)
    assert counts(b)["breaker_opened"] == 1
    pool_away["away"] = False

    def hit() -> bool:
        evict_all(b)
        return b.serve(TOKENS).tiers["storage"] == 192

    eventually(hit, 30)


def test_what_is_computed_before_the_pool_appears_is_stored_when_it_is_used_again(
    make, shared, pool_away
) -> None:
    b = make(config={"on_pool_unavailable": "degrade"})
    serve_and_store(b, TOKENS)
    assert len(shared) == 0
    pool_away["away"] = False

    def stored() -> bool:
        serve_and_store(b, TOKENS)
        return len(shared) == 12

    eventually(stored, 30)
