# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Beliefs age, are bounded and can be taken back; a memo answers only the question it was given."""

from __future__ import annotations

from ascend_direct.beliefs import MAX_MEMOS, Beliefs, LookupMemo, Suspects


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_the_believed_prefix_ends_at_the_first_unknown_key() -> None:
    beliefs = Beliefs(10, 60.0)
    beliefs.confirm(["a", "b", "d"])
    assert beliefs.prefix(["a", "b", "c", "d"]) == 2
    assert beliefs.prefix(["c"]) == 0
    assert beliefs.prefix([]) == 0


def test_a_belief_ends_with_its_time() -> None:
    clock = Clock()
    beliefs = Beliefs(10, 60.0, clock)
    beliefs.confirm(["a"])
    clock.now_s += 59
    assert beliefs.prefix(["a"]) == 1
    clock.now_s += 1
    assert beliefs.prefix(["a"]) == 0


def test_a_key_that_was_not_delivered_is_no_longer_believed() -> None:
    beliefs = Beliefs(10, 60.0)
    beliefs.confirm(["a", "b"])
    beliefs.doubt(["a", "never known"])
    assert beliefs.prefix(["a"]) == 0
    assert beliefs.prefix(["b"]) == 1


def test_beliefs_are_bounded_and_the_oldest_go_first() -> None:
    beliefs = Beliefs(2, 60.0)
    beliefs.confirm(["a", "b"])
    beliefs.confirm(["a", "c"])
    assert len(beliefs) == 2
    assert [beliefs.prefix([key]) for key in "abc"] == [1, 0, 1]


def test_capacity_zero_believes_nothing() -> None:
    beliefs = Beliefs(0, 60.0)
    beliefs.confirm(["a"])
    assert beliefs.prefix(["a"]) == 0


def test_a_memo_answers_the_same_question_for_a_while() -> None:
    clock = Clock()
    memo = LookupMemo(0.5, clock)
    memo.note("r", ["a", "b"], 1)
    assert memo.recall("r", ["a", "b"]) == 1
    assert memo.recall("r", ["b"]) is None  # the device prefix has grown: another question
    assert memo.recall("r", ["a"]) is None
    assert memo.recall("r", ["a", "c"]) is None  # as long, and other tokens
    assert memo.recall("other", ["a", "b"]) is None
    clock.now_s += 0.5
    assert memo.recall("r", ["a", "b"]) is None


def test_memos_of_requests_that_never_end_are_bounded() -> None:
    memo = LookupMemo(60.0)
    for i in range(MAX_MEMOS + 10):
        memo.note(str(i), ["a"], 0)
    assert len(memo) == MAX_MEMOS
    memo.forget(str(MAX_MEMOS))
    assert memo.recall(str(MAX_MEMOS), ["a"]) is None


def test_a_suspect_ends_the_prefix_until_its_time_is_over() -> None:
    clock = Clock()
    suspects = Suspects(10, 30.0, clock)
    assert suspects.clear_prefix(["a", "b"]) == 2
    suspects.add(["b"])
    assert suspects.clear_prefix(["a", "b", "c"]) == 1
    assert suspects.clear_prefix(["a", "c"]) == 2
    clock.now_s += 20
    suspects.add(["b"])
    clock.now_s += 20
    assert suspects.clear_prefix(["b"]) == 0
    clock.now_s += 10
    assert suspects.clear_prefix(["b"]) == 1
    assert len(suspects) == 0


def test_suspects_are_bounded_and_the_oldest_go_first() -> None:
    suspects = Suspects(2, 30.0, Clock())
    suspects.add(["a", "b", "c"])
    assert len(suspects) == 2
    assert suspects.clear_prefix(["a", "b"]) == 1
