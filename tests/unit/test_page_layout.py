# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Page arithmetic: every byte belongs to one page, and to one place in it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ascend_direct.errors import LayoutError
from ascend_direct.page_layout import PageLayout, Region, Span

BASE = 1 << 20
# No time limit per example: the machines that run this are shared.
briefly = settings(max_examples=60, deadline=None)


def span(
    part: str = "k", layer: int = 0, base: int = BASE, stride: int = 8, length: int = 8
) -> Span:
    return Span(layer, part, base, stride, length)


def layout(*spans: Span, num_pages: int = 4, page_size: int = 2, tag: str = "nhd") -> PageLayout:
    return PageLayout(spans, num_pages, page_size, tag)


def pages(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int64)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[PageLayout, int]:
    """Random layouts that fill their memory: layer by layer, or page by page. With total bytes."""
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
    num_pages = draw(st.integers(2, 7))
    page_bytes = sum(lengths)
    spans, at = [], BASE
    by_page = draw(st.booleans())
    for number, length in enumerate(lengths):
        stride = page_bytes if by_page else length
        spans.append(Span(number // 2, "kv"[number % 2], at, stride, length))
        at += length if by_page else length * num_pages
    shuffled = draw(st.permutations(spans))
    return PageLayout(tuple(shuffled), num_pages, 1, "nhd"), page_bytes * num_pages


class TestAddresses:
    @briefly
    @given(layouts())
    def test_cover_every_byte_exactly_once(self, case: tuple[PageLayout, int]) -> None:
        made, total_bytes = case
        owners = np.zeros(total_bytes, dtype=np.int64)
        real = made.addresses(np.arange(1, made.num_pages))
        padding = np.array([[s.base for s in made.spans]])
        for row in np.concatenate([padding, real]):
            for address, length in zip(row - BASE, made.lengths_bytes, strict=True):
                owners[address : address + length] += 1
        assert (owners == 1).all()

    @briefly
    @given(layouts())
    def test_lie_in_the_regions(self, case: tuple[PageLayout, int]) -> None:
        made, total_bytes = case
        assert made.regions() == (Region(BASE, total_bytes),)

    def test_follow_the_pages_asked_for(self) -> None:
        made = layout(span("k"), span("v", base=BASE + 100, stride=4, length=4))
        assert made.addresses(pages(3, 1)).tolist() == [
            [BASE + 24, BASE + 112],
            [BASE + 8, BASE + 104],
        ]
        assert made.lengths_bytes == (8, 4)
        assert made.page_bytes == 12

    def test_of_no_pages_are_none(self) -> None:
        assert layout(span()).addresses(pages()).shape == (0, 1)

    def test_reach_beyond_32_bits(self) -> None:
        high = 0x7FFF_0000_0000
        made = layout(span(base=high, stride=1 << 30, length=1 << 30), num_pages=300)
        assert made.addresses(pages(299)).tolist() == [[high + (299 << 30)]]

    @pytest.mark.parametrize("wrong", [0, -1, 4])
    def test_refuse_padding_and_pages_that_are_not_there(self, wrong: int) -> None:
        with pytest.raises(LayoutError, match=r"pages must lie in 1 … 3"):
            layout(span()).addresses(pages(1, wrong))

    def test_refuse_a_page_named_twice(self) -> None:
        with pytest.raises(LayoutError, match="twice"):
            layout(span()).addresses(pages(1, 2, 1))


class TestRegions:
    def test_stay_apart_where_memory_is_not_ours(self) -> None:
        made = layout(span("k"), span("v", base=BASE + 1000))
        assert made.regions() == (Region(BASE, 32), Region(BASE + 1000, 32))

    def test_end_with_the_last_page_not_with_its_stride(self) -> None:
        assert layout(span(stride=100, length=8)).regions() == (Region(BASE, 308),)


class TestImpossibleLayouts:
    @pytest.mark.parametrize(
        ("spans", "why"),
        [
            ((), "no spans"),
            ((span(length=0),), "k of layer 0 is empty"),
            ((span(base=0),), "k of layer 0 is empty"),
            ((span(stride=7),), "pages of k of layer 0 overlap"),
            ((span(), span(base=BASE + 500)), "named twice"),
            ((span(), span("v", base=BASE + 31)), "k of layer 0 and v of layer 0 overlap"),
            (
                (span(stride=16), span("v", base=BASE + 4, stride=16)),
                "k of layer 0 and v of layer 0 overlap",
            ),
            # Same range, other strides: some pages would meet.
            ((span(stride=16), span("v", base=BASE + 8, stride=24)), "overlap"),
            # The second span's run would cross into the next page of the first.
            ((span(stride=16, length=4), span("v", base=BASE + 12, stride=16)), "overlap"),
        ],
    )
    def test_are_refused_by_name(self, spans: tuple[Span, ...], why: str) -> None:
        with pytest.raises(LayoutError, match=why):
            layout(*spans)

    def test_need_a_page_beside_the_padding(self) -> None:
        with pytest.raises(LayoutError, match="page 0 is padding"):
            layout(span(), num_pages=1)

    def test_need_a_page_size(self) -> None:
        with pytest.raises(LayoutError, match="page size 0"):
            layout(span(), page_size=0)

    def test_report_all_problems_at_once(self) -> None:
        with pytest.raises(LayoutError, match=r"page 0 is padding.*k of layer 0 is empty"):
            layout(span(length=0), num_pages=1)


class TestDigest:
    made = layout(span("k"), span("v", base=BASE + 100))

    def test_ignores_addresses_and_the_size_of_the_pool(self) -> None:
        moved = layout(span("k", base=BASE * 2, stride=80), span("v", base=BASE * 3), num_pages=90)
        assert moved.digest() == self.made.digest()

    @pytest.mark.parametrize(
        "other",
        [
            layout(span("v", base=BASE + 100), span("k")),
            layout(span("k"), span("v", layer=1, base=BASE + 100)),
            layout(span("k"), span("v", base=BASE + 100, length=4)),
            replace(made, tag="hnd"),
            replace(made, page_size_tokens=4),
            replace(made, fields=(("dtype", "bfloat16"),)),
        ],
    )
    def test_changes_with_what_changes_a_page(self, other: PageLayout) -> None:
        assert other.digest() != self.made.digest()
