# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Keys: whatever changes a page's bytes changes its key, and nothing else does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from ascend_direct.errors import DirectError
from ascend_direct.page_key import (
    REPLICATED,
    Namespace,
    PageKeys,
    _frame,
    head_part,
    rank_part,
)
from ascend_direct.store.base import MAX_KEY_BYTES

# No time limit per example: the machines that run this are shared.
briefly = settings(max_examples=40, deadline=None)
NAMESPACE = "0123456789abcdef"
PAGE_HASH = "ab" * 32

scalars = st.none() | st.booleans() | st.integers() | st.text(max_size=8)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=5,
)
field_maps = st.dictionaries(st.text(min_size=1, max_size=6), values, max_size=6)


def identity(value: Any) -> Any:
    """Equality with types: Python takes True for 1."""
    if isinstance(value, dict):
        return {name: identity(item) for name, item in value.items()}
    if isinstance(value, list):
        return [identity(item) for item in value]
    return (type(value).__name__, value)


class TestNamespace:
    @briefly
    @given(field_maps, field_maps)
    @example({"a": 1}, {"a": True})
    @example({"a": "1"}, {"a": 1})
    @example({"a": None}, {"a": "None"})
    @example({"a": ""}, {"a": None})
    @example({"a": []}, {"a": {}})
    @example({"a": ["b", "c"]}, {"a": ["bc"]})
    @example({"a": "b1:c"}, {"a": "b", "c": "1"})
    @example({"a": {"b": 1}, "c": 2}, {"a": {"b": 1, "c": 2}})
    def test_is_shared_by_equal_fields_and_by_no_others(
        self, one: dict[str, Any], other: dict[str, Any]
    ) -> None:
        same = identity(one) == identity(other)
        assert (Namespace(one).digest == Namespace(other).digest) is same
        assert (Namespace(one).digest16 == Namespace(other).digest16) is same

    @briefly
    @given(st.lists(values, max_size=4), st.lists(values, max_size=4))
    @example(["a", "bc"], ["ab", "c"])
    @example([["a"], "b"], [["a", "b"]])
    @example(["s1:a"], ["a"])
    def test_framing_never_gives_two_values_the_same_bytes(
        self, one: list[Any], other: list[Any]
    ) -> None:
        assert (_frame(one) == _frame(other)) is (identity(one) == identity(other))

    @briefly
    @given(field_maps, st.data())
    def test_changes_with_any_single_field(
        self, fields: dict[str, Any], data: st.DataObject
    ) -> None:
        assume(fields)
        name = data.draw(st.sampled_from(sorted(fields)))
        changed = copy.deepcopy(fields)
        changed[name] = data.draw(values)
        assume(identity(changed) != identity(fields))
        assert Namespace(changed).digest16 != Namespace(fields).digest16

    @briefly
    @given(field_maps, st.randoms())
    def test_does_not_depend_on_the_order_of_fields(
        self, fields: dict[str, Any], random: Any
    ) -> None:
        names = list(fields)
        random.shuffle(names)
        shuffled = {name: fields[name] for name in names}
        assert Namespace(shuffled).digest == Namespace(fields).digest

    def test_is_pinned_so_that_a_release_cannot_lose_the_pool_unnoticed(self) -> None:
        fields = {"model": {"model": "id:m", "dtype": '"auto"'}, "layout": "f00d", "tp": 2}
        assert Namespace(fields).digest16 == "694976ea6638e961"

    def test_tuples_and_lists_are_one(self) -> None:
        assert Namespace({"a": (1, 2)}).digest == Namespace({"a": [1, 2]}).digest

    @pytest.mark.parametrize("value", [1.5, b"bytes", {1: "x"}, {"a": {2}}, object()])
    def test_refuses_values_without_one_spelling(self, value: Any) -> None:
        with pytest.raises(DirectError, match="namespace field"):
            _ = Namespace({"a": value}).digest


class TestRankPart:
    def test_names_rank_and_size_where_heads_are_split(self) -> None:
        assert rank_part(1, 4, replicated=False) == "r1of4"

    def test_is_absent_where_ranks_hold_the_same_bytes(self) -> None:
        assert {rank_part(rank, 4, replicated=True) for rank in range(4)} == {REPLICATED}

    def test_can_name_heads_instead_whatever_the_number_of_ranks(self) -> None:
        assert head_part(0, 3) == "h0-3"
        assert head_part(7, 7) == "h7-7"

    def test_two_ranks_never_share_a_part(self) -> None:
        parts = [rank_part(r, n, replicated=False) for n in range(1, 9) for r in range(n)]
        parts += [head_part(a, b) for a in range(8) for b in range(a, 8)]
        assert len(set(parts)) == len(parts)

    @pytest.mark.parametrize(("rank", "size"), [(-1, 2), (2, 2), (0, 0)])
    def test_refuses_a_rank_that_is_not_there(self, rank: int, size: int) -> None:
        with pytest.raises(DirectError, match="no rank"):
            rank_part(rank, size, replicated=True)

    @pytest.mark.parametrize(("first", "last"), [(-1, 2), (3, 2)])
    def test_refuses_an_empty_head_range(self, first: int, last: int) -> None:
        with pytest.raises(DirectError, match="no head range"):
            head_part(first, last)


class TestPageKeys:
    def test_have_the_documented_form(self) -> None:
        assert PageKeys(NAMESPACE, "r0of2").key(PAGE_HASH) == f"ad1:{NAMESPACE}:r0of2:{PAGE_HASH}"
        assert PageKeys(NAMESPACE).key(PAGE_HASH) == f"ad1:{NAMESPACE}:-:{PAGE_HASH}"

    @briefly
    @given(st.lists(st.text("0123456789abcdef", min_size=8, max_size=8), max_size=5))
    def test_of_many_pages_are_the_keys_of_each(self, hashes: list[str]) -> None:
        keys = PageKeys(NAMESPACE, "h0-3")
        assert keys.keys(hashes) == [keys.key(page_hash) for page_hash in hashes]

    @briefly
    @given(
        st.integers(0, 99_998),
        st.text(alphabet="0123456789abcdefXYZ_.-", min_size=1, max_size=200),
    )
    @example(99_998, "f" * 200)
    def test_stay_below_the_stores_limit(self, rank: int, page_hash: str) -> None:
        key = PageKeys(NAMESPACE, rank_part(rank, 99_999, replicated=False)).key(page_hash)
        assert len(key.encode()) < MAX_KEY_BYTES
        assert key.split(":") == ["ad1", NAMESPACE, f"r{rank}of99999", page_hash]

    @pytest.mark.parametrize("page_hash", ["", "a:b", "a b", "a\n", "é", "a/b", "f" * 201, "a\0"])
    def test_refuse_a_hash_that_breaks_their_form(self, page_hash: str) -> None:
        with pytest.raises(DirectError, match="not a page hash"):
            PageKeys(NAMESPACE).keys([PAGE_HASH, page_hash])

    @pytest.mark.parametrize("namespace", ["", "0123", NAMESPACE.upper(), NAMESPACE + "0", "a:b"])
    def test_refuse_a_malformed_namespace(self, namespace: str) -> None:
        with pytest.raises(DirectError, match="16 hexadecimal digits"):
            PageKeys(namespace)

    @pytest.mark.parametrize("part", ["", "r0", "r0of", "h3", "r0of2:x", "--", "r0of2\n"])
    def test_refuse_a_malformed_rank_part(self, part: str) -> None:
        with pytest.raises(DirectError, match="not a rank part"):
            PageKeys(NAMESPACE, part)
