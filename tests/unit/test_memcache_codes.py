# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Every return code of MemCache 1.3 has a meaning, and a whole call's codes become one answer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from ascend_direct.config import MemcacheConfig
from ascend_direct.errors import StoreUnavailable
from ascend_direct.store import memcache_codes
from ascend_direct.store.base import PageBatch, PageStatus
from ascend_direct.store.memcache import JOIN_RACE_PAUSES_S, MemcacheStore
from ascend_direct.store.memcache_codes import CODES, EXISTS_CODES, PUT_CODES, CodeLog

OK, MISSING, MISMATCH, FULL, UNAVAILABLE, FAILED = PageStatus
# MmcErrorCode of MemCache 1.3, and -2 of the copy engine below it. -3012 is not in the enumeration
# but answered for another size.
NATIVE = (0, -1, -2, *range(-3020, -2999), *range(-3108, -3100))


class ScriptedClient:
    """A native client that answers each call with the next list of codes."""

    def __init__(self, *answers: list[int]) -> None:
        self.answers = list(answers)
        self.sent: list[list[str]] = []

    def batch_is_exist(self, keys: Sequence[str]) -> list[int]:
        self.sent.append(list(keys))
        return self.answers.pop(0)

    def batch_get_into_layers(self, keys: Sequence[str], *_: Any) -> list[int]:
        return self.batch_is_exist(keys)

    batch_put_from_layers = batch_get_into_layers


def opened(*answers: list[int]) -> tuple[MemcacheStore, ScriptedClient]:
    store, client = MemcacheStore(MemcacheConfig()), ScriptedClient(*answers)
    store._native = client
    return store, client


def pages(count: int) -> PageBatch:
    return PageBatch(np.arange(1, 2 * count + 1, dtype=np.int64).reshape(count, 2), (8, 8))


@pytest.mark.parametrize("code", NATIVE)
def test_every_code_has_a_meaning_in_every_operation(code: int) -> None:
    for table in (CODES, PUT_CODES, EXISTS_CODES):
        assert table[code].meaning


def test_nothing_but_success_makes_bytes_usable() -> None:
    assert [code for code, entry in CODES.items() if entry.status is OK] == [0]
    assert {code for code, entry in PUT_CODES.items() if entry.status is OK} == {0, -3006}
    assert [code for code, entry in EXISTS_CODES.items() if entry.status is OK] == [1]


def test_only_codes_about_the_whole_pool_can_end_a_call() -> None:
    for entry in CODES.values():
        assert not entry.pool_gone or entry.status is UNAVAILABLE


@pytest.mark.parametrize(
    ("code", "in_put", "in_get", "in_exists"),
    [
        (0, OK, OK, MISSING),
        (1, FAILED, FAILED, OK),
        (-1, FULL, FAILED, FAILED),
        (-3007, MISSING, MISSING, MISSING),
        (-3102, MISSING, MISSING, MISSING),
        (-3012, MISMATCH, MISMATCH, MISMATCH),
        (-3014, UNAVAILABLE, UNAVAILABLE, UNAVAILABLE),
        (-3104, UNAVAILABLE, UNAVAILABLE, UNAVAILABLE),
        (-999_999, FAILED, FAILED, FAILED),
    ],
)
def test_a_code_means_what_its_operation_says(
    code: int, in_put: PageStatus, in_get: PageStatus, in_exists: PageStatus
) -> None:
    keys = ["a", "b"]
    assert opened([0, code])[0].put(keys, pages(2)) == [OK, in_put]
    assert opened([0, code])[0].get(keys, pages(2)) == [OK, in_get]
    assert opened([1, code])[0].exists(keys) == [OK, in_exists]


@pytest.mark.parametrize("code", [-3000, -3003, -3004, -3008, -3014, -3017, -3019])
def test_a_pool_that_is_gone_for_every_key_ends_the_call(code: int) -> None:
    store, _ = opened([code, -3014], [code, 0])
    with pytest.raises(StoreUnavailable) as caught:
        store.get(["a", "b"], pages(2))
    assert caught.value.code == code
    assert store.get(["a", "b"], pages(2)) == [UNAVAILABLE, OK]


@pytest.mark.parametrize("answer", [[], [0], [0, 0, 0]])
def test_a_list_of_another_length_is_never_read(answer: list[int]) -> None:
    for operation in ("get", "put"):
        store, _ = opened(answer)
        with pytest.raises(StoreUnavailable, match=f"{len(answer)} answers for 2 keys"):
            getattr(store, operation)(["a", "b"], pages(2))
    store, _ = opened(answer)
    with pytest.raises(StoreUnavailable, match="answers for 2 keys"):
        store.exists(["a", "b"])


def test_bad_keys_are_not_sent_and_answers_go_back_to_their_rows() -> None:
    keys = ["", "a", "é" * 129, "b", "x\0y", "\ud800", "k" * 256]
    answers = [FAILED, OK, FAILED, MISSING, FAILED, FAILED, MISMATCH]
    store, client = opened([0, -3007, -3012])
    assert store.get(keys, pages(7)) == answers
    assert client.sent == [["a", "b", "k" * 256]]
    assert store.exists(["", "\0"]) == [FAILED, FAILED]
    assert len(client.sent) == 1, "nothing left to ask"


def test_a_put_refused_by_the_join_race_is_tried_again_for_those_pages_alone() -> None:
    store, client = opened([0, -2, -2], [-2, 0], [-1])
    assert store.put(["a", "b", "c"], pages(3)) == [OK, FULL, OK]
    assert client.sent == [["a", "b", "c"], ["b", "c"], ["b"]]


def test_the_join_race_is_given_up_after_a_second_or_so() -> None:
    store, client = opened(*([[-2]] * 10))
    assert store.put(["a"], pages(1)) == [UNAVAILABLE]
    assert len(client.sent) == 1 + len(JOIN_RACE_PAUSES_S)
    assert sum(JOIN_RACE_PAUSES_S) <= 1.5


def test_a_client_that_closes_during_the_retries_leaves_the_page_unavailable() -> None:
    store, _ = opened([0, -2], [], [], [])
    assert store.put(["a", "b"], pages(2)) == [OK, UNAVAILABLE]


def test_before_open_every_call_is_unavailable() -> None:
    store = MemcacheStore(MemcacheConfig())
    for call in (lambda: store.exists([]), lambda: store.get([], pages(0))):
        with pytest.raises(StoreUnavailable, match="not open"):
            call()
    assert store.stats().capacity_bytes is None
    store.close()


def test_a_code_is_logged_with_its_meaning_once_in_a_while(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = CodeLog()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            log.note("get", {0: CODES[0], -3007: CODES[-3007], -3004: CODES[-3004]})
        assert [r.getMessage() for r in caplog.records] == [
            "MemCache get answered -3004: no answer from MetaService in time"
        ]
        monkeypatch.setattr(memcache_codes, "LOG_INTERVAL_S", 0.0)
        log.note("get", {-3004: CODES[-3004]})
    assert len(caplog.records) == 2
