# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Where the bytes of one KV page lie: pool buffers → spans (address, bytes) per page.

Owns the arithmetic and its checks. Knows nothing of SGLang's pool classes (integration/pool_layout
reads them), of stores, or of devices. Addresses and sizes are plain integers, in bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from ascend_direct.errors import LayoutError

# Part of the namespace: raise it when the order of spans inside a stored page changes.
SPAN_ORDER_VERSION = 1

Addresses = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Span:
    """One run of bytes that every page has: page `p` owns [base + p·stride, + length).

    Attributes:
        layer: model layer the bytes belong to.
        part: what they are (``k``, ``v``, ``kv``, ``index_k``, ``index_scale``).
        base: address of page 0's run.
        stride_bytes: distance between the runs of neighbouring pages.
        length_bytes: bytes of the run.
        piece: which of several runs of one (layer, part); 0 where there is one.
    """

    layer: int
    part: str
    base: int
    stride_bytes: int
    length_bytes: int
    piece: int = 0


@dataclass(frozen=True)
class Region:
    """Memory that holds spans, for stores that must register it. Bytes."""

    address: int
    length_bytes: int


@dataclass(frozen=True)
class PageLayout:
    """All spans of a pool, in the order in which a page is stored.

    A page is stored as one object, or as one object per group of heads (`by_heads`), so that
    servers that hold other ranges of heads can share it.

    Attributes:
        spans: one entry per run of bytes, object by object; an object is their concatenation.
        num_pages: pages in the pool, the padding page 0 included.
        page_size_tokens: tokens per page.
        tag: byte order inside a span (``nhd``, ``npu_paged_nhd``, …); part of the namespace.
        fields: further facts that change the bytes (dtypes, heads, dims); part of the namespace.
        objects_per_page: stored objects a page consists of, of one size each.

    Raises:
        LayoutError: spans overlap, are empty, or are named twice.
    """

    spans: tuple[Span, ...]
    num_pages: int
    page_size_tokens: int
    tag: str
    fields: tuple[tuple[str, Any], ...] = ()
    objects_per_page: int = 1

    def __post_init__(self) -> None:
        problems = list(_problems(self.spans, self.num_pages, self.page_size_tokens))
        if problems:
            raise LayoutError(f"layout {self.tag!r}: " + "; ".join(problems))

    @cached_property
    def page_bytes(self) -> int:
        """Bytes of one page in this pool."""
        return sum(span.length_bytes for span in self.spans)

    @property
    def object_bytes(self) -> int:
        """Bytes of one stored object."""
        return self.page_bytes // self.objects_per_page

    @cached_property
    def lengths_bytes(self) -> tuple[int, ...]:
        """Bytes of each span of an object, in stored order; the same for every object."""
        return tuple(span.length_bytes for span in self._first_object)

    @property
    def _first_object(self) -> tuple[Span, ...]:
        return self.spans[: len(self.spans) // self.objects_per_page]

    @cached_property
    def _bases(self) -> Addresses:
        return np.array([span.base for span in self.spans], dtype=np.int64)

    @cached_property
    def _strides(self) -> Addresses:
        return np.array([span.stride_bytes for span in self.spans], dtype=np.int64)

    def addresses(self, pages: npt.NDArray[np.int64]) -> Addresses:
        """Start address of every span of every object, page by page.

        Returns:
            int64 [len(pages) · objects_per_page, spans of an object].

        Raises:
            LayoutError: a page is outside 1 … num_pages − 1 (page 0 is padding) or given twice.
        """
        numbers = pages.tolist()  # checked as integers: numpy's first calls in a while take longer
        if numbers and not (min(numbers) >= 1 and max(numbers) < self.num_pages):
            raise LayoutError(f"pages must lie in 1 … {self.num_pages - 1}, got {numbers}")
        if len(set(numbers)) != len(numbers):
            raise LayoutError(f"a page is named twice: {numbers}")
        rows = self._bases[None, :] + pages[:, None] * self._strides[None, :]
        return rows.reshape(len(pages) * self.objects_per_page, len(self.lengths_bytes))

    def regions(self) -> tuple[Region, ...]:
        """The memory the spans lie in, neighbouring and overlapping runs joined."""
        runs = sorted(
            (span.base, span.base + (self.num_pages - 1) * span.stride_bytes + span.length_bytes)
            for span in self.spans
        )
        joined: list[list[int]] = []
        for start, end in runs:
            if joined and start <= joined[-1][1]:
                joined[-1][1] = max(joined[-1][1], end)
            else:
                joined.append([start, end])
        return tuple(Region(start, end - start) for start, end in joined)

    def digest(self) -> str:
        """Hash of what in the layout changes a stored page's bytes; addresses do not."""
        parts: dict[tuple[int, str], int] = {}  # how a part is cut into runs changes no byte
        for span in self._first_object:
            name = (span.layer, span.part)
            parts[name] = parts.get(name, 0) + span.length_bytes
        facts = (self.tag, self.page_size_tokens, tuple(parts.items()), self.fields)
        text = repr((SPAN_ORDER_VERSION, *facts))
        return hashlib.sha256(text.encode()).hexdigest()


def by_heads(
    layout: PageLayout, heads: int, heads_per_object: int, fields: tuple[tuple[str, Any], ...]
) -> PageLayout:
    """The same pages, stored as one object per group of heads.

    Args:
        layout: one object per page, a span per (layer, part) with all heads of this rank.
        heads: heads in each span.
        heads_per_object: heads of one stored object.
        fields: the layout's fields for such an object; nothing of `heads` in them.

    Raises:
        LayoutError: the heads do not divide, or lie in an order that cannot be cut.
    """
    runs = {"hnd": 1, "nhd": layout.page_size_tokens, "npu_paged_nhd": layout.page_size_tokens}
    if heads % heads_per_object or layout.tag not in runs:
        raise LayoutError(
            f"layout {layout.tag!r} with {heads} heads cannot be cut into {heads_per_object}"
        )
    groups = heads // heads_per_object
    spans = []
    for group in range(groups):
        for span in layout.spans:
            spans += _cut(span, runs[layout.tag], group, groups) if groups > 1 else [span]
    return PageLayout(
        tuple(spans), layout.num_pages, layout.page_size_tokens, layout.tag, fields, groups
    )


def _cut(span: Span, runs: int, group: int, groups: int) -> list[Span]:
    """One group's share of a span that holds all heads of a page, or of each of its tokens."""
    row_bytes = span.length_bytes // runs
    share_bytes = row_bytes // groups
    first = span.base + group * share_bytes
    return [
        Span(
            span.layer,
            span.part,
            first + run * row_bytes,
            span.stride_bytes,
            share_bytes,
            group * runs + run,
        )
        for run in range(runs)
    ]


def _problems(spans: Sequence[Span], num_pages: int, page_size_tokens: int) -> list[str]:
    problems = []
    if not spans:
        problems.append("no spans")
    if num_pages < 2:
        problems.append(f"{num_pages} pages: page 0 is padding, so at least 2 are needed")
    if page_size_tokens < 1:
        problems.append(f"page size {page_size_tokens}")
    for span in spans:
        if span.length_bytes < 1 or span.base < 1:
            problems.append(f"{span.part} of layer {span.layer} is empty")
        elif span.stride_bytes < span.length_bytes:
            problems.append(f"pages of {span.part} of layer {span.layer} overlap")
    names = [(span.layer, span.part, span.piece) for span in spans]
    if len(set(names)) != len(names):
        problems.append("a (layer, part) is named twice")
    # Pieces are cut out of spans that were checked whole; pair by pair they would take minutes.
    return problems or _overlaps([span for span in spans if not span.piece], num_pages)


def _overlaps(spans: Sequence[Span], num_pages: int) -> list[str]:
    """Two spans of one page, or of two pages, that share a byte.

    Spans either lie in disjoint address ranges, or interleave with one stride inside one range.
    """
    ordered = sorted(spans, key=lambda span: span.base)
    problems = []
    for i, one in enumerate(ordered):
        one_end = one.base + (num_pages - 1) * one.stride_bytes + one.length_bytes
        for other in ordered[i + 1 :]:
            if other.base >= one_end:
                break
            shift = other.base - one.base
            inside = (
                one.stride_bytes == other.stride_bytes
                and shift % one.stride_bytes >= one.length_bytes
                and shift % one.stride_bytes + other.length_bytes <= one.stride_bytes
            )
            if not inside:
                names = [f"{span.part} of layer {span.layer}" for span in (one, other)]
                problems.append(" and ".join(names) + " overlap")
    return problems
