# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""A pool over several hosts carries pages between all of them, and outlives the loss of one.

Real MemCache processes over host_tcp, each host a network namespace: no host shares memory,
files or a loopback device with another.
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable

import numpy as np
import pytest

from ascend_direct.store.base import PageStatus
from tests.contract.store_contract import new_keys
from tests.multi_host.hosts import Network, NetworkError
from tests.multi_host.machine import Machine

NUMBERS, ELSEWHERE = [1, 5, 9, 3], [2, 4, 6, 8]
# MetaService misses a host after some 25 s; a native call to one that has gone takes some 31 s.
MISSED_S = 120.0
# MetaService tells members about their pages a little after a put; one that vanishes meanwhile can
# hold it up for a minute more.
SETTLE_S = 3.0


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(17)


def stored_on(machine: Machine, rng: np.random.Generator) -> tuple[list[str], list[bytes]]:
    """New pages that a host's client has put on the host's member: keys and bytes."""
    keys = new_keys(len(NUMBERS))
    machine.fill(rng)
    wanted = machine.pages(NUMBERS)
    assert machine.store(keys, NUMBERS)
    return keys, wanted


def loads(machine: Machine, keys: list[str], wanted: list[bytes]) -> bool:
    """Whether a load lands; the bytes of one that does must be right."""
    machine.arena.bytes[:] = 0
    if not machine.load(keys, ELSEWHERE).landed:
        return False
    assert machine.pages(ELSEWHERE) == wanted
    return True


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + MISSED_S
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {MISSED_S:.0f} s: {what}"
        time.sleep(0.2)


def test_hosts_reach_each_other_by_the_router_and_nothing_else() -> None:
    with Network(2) as network:
        one, other = network.hosts
        reach = ("timeout", "5", "bash", "-c", f"echo > /dev/tcp/{other.address}/9")
        with pytest.raises(NetworkError, match="refused"):  # nobody listens, but it is there
            one.run(*reach)
        other.unplug()
        with pytest.raises(NetworkError) as gone:
            one.run(*reach)
        assert "refused" not in str(gone.value)
        addresses = re.findall(r"inet (\S+)/", one.run("ip", "-4", "address"))
        assert sorted(addresses) == sorted(["127.0.0.1", one.address])


def test_what_one_host_stores_every_other_loads_byte_for_byte(
    machines: list[Machine], rng: np.random.Generator
) -> None:
    for owner in machines:
        keys, wanted = stored_on(owner, rng)
        for reader in machines:
            assert reader.engine.stored_prefix([*keys, *new_keys(1)]) == len(keys)
            assert loads(reader, keys, wanted)


def test_a_host_that_vanishes_takes_its_pages_only_and_comes_back(
    machines: list[Machine], rng: np.random.Generator
) -> None:
    near, witness, lost = machines
    kept, kept_bytes = stored_on(near, rng)
    gone, gone_bytes = stored_on(lost, rng)
    assert loads(witness, gone, gone_bytes)

    time.sleep(SETTLE_S)
    lost.host.unplug()
    late = near.load(gone, ELSEWHERE)
    assert not late.landed
    assert late.late is not None
    assert not late.late.returned, "the deadline ended the wait; the native call hangs on"
    assert not near.engine.may_load, "no load is promised while one is stuck"
    assert loads(witness, kept, kept_bytes), "pages of other hosts stay within reach"
    wait_until(lambda: witness.engine.stored_prefix(gone) == 0, "its pages are misses")
    assert witness.client.exists(gone) == [PageStatus.MISSING] * len(gone)
    fresh, fresh_bytes = stored_on(witness, rng)
    wait_until(lambda: near.engine.may_load, "the stuck call returns")
    wait_until(lambda: loads(near, fresh, fresh_bytes), "the host that waited loads again")

    lost.power_off()
    lost.host.plug_in()
    lost.start()
    keys, wanted = stored_on(lost, rng)
    for reader, (a_key, some_bytes) in itertools.product(
        machines, [(kept, kept_bytes), (keys, wanted)]
    ):
        assert loads(reader, a_key, some_bytes)
