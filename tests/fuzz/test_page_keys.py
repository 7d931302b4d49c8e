# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""A key has the documented form or is refused; two pages never share one."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from ascend_direct.errors import DirectError
from ascend_direct.page_key import Namespace, PageKeys
from ascend_direct.store.base import MAX_KEY_BYTES
from tests.fuzz.budget import FUZZ

FORM = re.compile(r"ad1:[0-9a-f]{16}:(-|r[0-9]+of[0-9]+|h[0-9]+-[0-9]+):[!-9;-~]+", re.ASCII)
_DIGITS = st.text("0123456789abcdef٣", min_size=15, max_size=17)
_PARTS = st.sampled_from(["-", "r0of2", "h0-3", "r٣of٤", "h0-3\n", "r0of2:"]) | st.text(max_size=8)
_HASHES = (
    st.text("0123456789abcdef", min_size=1, max_size=64)
    | st.text(max_size=201)
    | st.text("a:-_.\n\0é", max_size=8)
)


@given(_DIGITS | st.text(), st.lists(_PARTS, max_size=3), st.lists(_HASHES, max_size=4))
@FUZZ
def test_any_parts_make_keys_of_the_documented_form_or_are_refused(
    digest: str, parts: list[str], hashes: list[str]
) -> None:
    try:
        keys = PageKeys(digest, *parts)
        made = keys.keys(hashes)
    except DirectError:
        return
    assert len(made) == len(hashes) * keys.per_page
    for key in made:
        assert FORM.fullmatch(key)
        assert len(key.encode()) <= MAX_KEY_BYTES
    if len(set(parts)) == len(parts):
        assert len(set(made)) == len(set(hashes)) * keys.per_page


_FIELDS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.sampled_from(["\ud800", "1:s1:a"]),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(), below, max_size=3),
    max_leaves=8,
)
_MAPPINGS = st.dictionaries(st.text(), _FIELDS, max_size=4)


def _typed(value: object) -> object:
    """The value such that equal means the same: True is not 1."""
    if isinstance(value, dict):
        return {name: _typed(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_typed(item) for item in value]
    return (type(value).__name__, value)


@given(_MAPPINGS, _MAPPINGS)
@FUZZ
def test_any_two_namespaces_are_one_exactly_when_their_fields_are(one: dict, other: dict) -> None:
    same = _typed(one) == _typed(other)
    assert (Namespace(one).digest == Namespace(other).digest) is same
