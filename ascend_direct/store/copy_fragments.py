# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""The Triton kernel that packs and unpacks pages in device memory: the option `transfer`.

Owns the kernel only; device_page_packer.py launches it. Written to Triton-Ascend's rules: a 1-D
grid of as many programs as there are vector cores, each with a loop; whole tiles of neighbouring
elements, two of which fit the unified buffer; every address is a scalar plus a range, so that no
load or store of a tile is indirect. tests/kernels holds it to them; not run on an NPU or a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl


# One binary for each direction and element, whatever the batch: to specialise on a number of pages
# or on the alignment of a page would compile, for seconds, under the deadline of a load. For the
# same reason `step` has one type.
@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=[
        *("memory", "block", "starts", "places", "rows"),
        *("fragments", "step", "length", "page_length", "offset"),
    ]
)
def copy_fragments(  # type: ignore[no-untyped-def]
    memory,
    block,
    starts,
    places,
    rows,
    fragments,
    step: tl.int64,
    length,
    page_length,
    offset,
    PACK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Copy one run of fragments of some pages into the block, or out of it.

    All counts are in elements of `memory` and `block`, which have one dtype.

    Args:
        memory: pointer from which `starts` count.
        block: pointer to packed pages, `page_length` each.
        starts: int64 [rows], where the run's first fragment begins in `memory`.
        places: int64 [rows], which page of the block a row is.
        fragments: in the run, `step` apart and `length` long.
        offset: of the run in a packed page.
        PACK: into the block; else out of it.
        TILE: a power of two.
    """
    tiles = tl.cdiv(length, TILE)
    for work in range(tl.program_id(0), rows * fragments * tiles, tl.num_programs(0)):
        row = work // (fragments * tiles)
        fragment = work // tiles % fragments
        at = work % tiles * TILE + tl.arange(0, TILE)
        inside = at < length
        scattered = memory + (tl.load(starts + row) + fragment.to(tl.int64) * step) + at
        page = block + tl.load(places + row) * page_length
        packed = page + (offset + fragment * length) + at
        if PACK:
            tl.store(packed, tl.load(scattered, mask=inside), mask=inside)
        else:
            tl.store(scattered, tl.load(packed, mask=inside), mask=inside)
