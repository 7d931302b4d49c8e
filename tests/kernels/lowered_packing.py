# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""A program: what triton-ascend's front end makes of the launches of a block, as JSON on stdout.

Owns taking launches instead of making them, and the passes up to linalg for an Ascend 910B, which
is where triton-ascend hands over to CANN's bishengir-compile. What the result must be is in
test_copy_fragments.py, which starts this beside Triton.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton._C.libtriton import ir
from triton.backends.ascend.compiler import AscendBackend, make_ttir, ttir_to_linalg
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ascend_direct.store.copy_fragments import copy_fragments
from ascend_direct.store.device_page_packer import NPU_TILE_BYTES, DeviceBlock
from tests.kernels.interpreted_packing import KINDS, Interpreter

TARGET = GPUTarget("npu", "Ascend910B3", 0)
BACKEND = AscendBackend(TARGET)
LAYOUTS = 60


@triton.jit
def gather(source, target, indices, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """What the rules forbid, to show that it would be seen: a load through loaded addresses."""
    at = tl.arange(0, TILE)
    tl.store(target + at, tl.load(source + tl.load(indices + at)))


def bound(kernel: Any, args: Any, options: Any) -> tuple[str, ASTSource]:
    """The name under which Triton keeps the binary of this launch, and its source."""
    if kernel.binder is None:
        kernel.create_binder(BACKEND)
    arguments, types, constexprs, others, _ = kernel.binder(*args, **options)
    attributes = BACKEND.get_attrs_descriptor(kernel.params, tuple(arguments.values()))
    fixed = attributes.get_constants()
    constants = {
        p.name: value
        for p, value in zip(kernel.params, arguments.values(), strict=True)
        if p.is_constexpr or p.num in fixed
    }
    names = [p.name for p in kernel.params if not p.is_constexpr]
    signature = dict(zip(names, types[: len(others)], strict=True))
    return f"{types}{constexprs}", ASTSource(kernel, signature, constants, attributes)


def lower(source: ASTSource) -> dict[str, str]:
    options = BACKEND.parse_options({})
    context = ir.context()
    ir.load_dialects(context)
    BACKEND.load_dialects(context)
    code = BACKEND.get_codegen_implementation()
    module = source.make_ir(options, code, BACKEND.get_module_map(), context)
    metadata = {"target": TARGET, **options.__dict__}
    module = make_ttir(module, metadata, options)
    return {"ttir": str(module), "linalg": ttir_to_linalg(module, metadata, options)}


def main() -> None:
    grids: list[tuple[int, ...]] = []
    sources: dict[str, ASTSource] = {}

    def take(*args: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> None:
        grids.append(grid)
        key, source = bound(copy_fragments, args, options)
        sources.setdefault(key, source)

    copy_fragments.run = take
    for number in range(LAYOUTS):
        rng = np.random.default_rng(number)
        pages = KINDS[number % len(KINDS)](rng).pages
        block = DeviceBlock(len(pages) * pages.page_bytes, Interpreter(NPU_TILE_BYTES))  # type: ignore
        block.pack(pages)
        block.unpack(pages, range(len(pages)))
    tensors = [torch.zeros(64, dtype=torch.int32) for _ in range(3)]
    answer = {
        "grids": sorted(set(grids)),
        "kernels": [lower(source) for source in sources.values()],
        "gather": lower(bound(gather, tensors, {"TILE": 64})[1]),
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
