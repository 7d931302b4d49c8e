# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""The packing kernel in triton-ascend: run by its interpreter, and lowered by its front end.

Evidence rung E3. Its results are the reference's bit by bit, and what it is lowered to keeps an
NPU's rules; no NPU has run it. Both are programs of their own, beside the Triton that install.py
puts into a folder of .venv.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ascend_direct.store.device_page_packer import NPU_TILE_BYTES
from scripts.sglang_cpu.install import TRITON_FOLDER

pytestmark = pytest.mark.triton

ROOT = Path(__file__).resolve().parents[2]
UNIFIED_BUFFER_BYTES = 192 * 1024


def run(program: str, *arguments: str, **variables: str) -> str:
    """What a program of this folder prints, beside Triton."""
    path = os.pathsep.join([str(Path(sys.prefix, TRITON_FOLDER)), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", f"tests.kernels.{program}", *arguments],
        env={**os.environ, "PYTHONPATH": path, **variables},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- what it does


def test_the_kernel_agrees_with_the_reference_both_ways() -> None:
    seed = os.environ.get("PACKING_SEED", "0")
    layouts = os.environ.get("PACKING_LAYOUTS", "100")
    printed = run(
        "interpreted_packing", f"--layouts={layouts}", f"--seed={seed}", TRITON_INTERPRET="1"
    )
    assert printed == f"{layouts} layouts agree\n"


# --- what an NPU is given


@pytest.fixture(scope="module")
def lowered(tmp_path_factory: pytest.TempPathFactory) -> Any:
    cache = tmp_path_factory.mktemp("triton")
    return json.loads(run("lowered_packing", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(cache)))


def linalg(lowered: Any) -> list[str]:
    return [kernel["linalg"] for kernel in lowered["kernels"]]


def test_batches_of_all_kinds_share_one_binary_a_direction_and_element(lowered: Any) -> None:
    """Compiling takes seconds, and would happen while a request waits for its load."""
    assert len(lowered["kernels"]) == 2 * len(["bytes", "words"])


def test_the_grid_has_one_dimension(lowered: Any) -> None:
    assert {len(grid) for grid in lowered["grids"]} == {1}
    for kernel in lowered["kernels"]:
        assert set(re.findall(r"tt\.get_(?:program_id|num_programs) (\w)", kernel["ttir"])) == {"x"}


def test_a_tile_and_the_next_fit_the_unified_buffer(lowered: Any) -> None:
    for code in linalg(lowered):
        (tile,) = re.findall(r"memref\.alloc\(\) : memref<(\d+x\w+)>", code)
        assert 2 * size_bytes(tile) <= UNIFIED_BUFFER_BYTES
        assert "tensor.empty" not in code, "another buffer"
        shapes = re.findall(r"(?:memref|tensor)<(\d+x\w+)", code)
        assert max(map(size_bytes, shapes)) == size_bytes(tile) == NPU_TILE_BYTES


def size_bytes(shape: str) -> int:
    count, element = shape.split("x")
    return int(count) * {"i8": 1, "i32": 4, "i64": 8}[element]


def is_indirect(code: str) -> bool:
    """Whether elements are moved one by one, through addresses that were computed for each."""
    return "DiscreteMemAccess" in code or "ExtractedLoadOrStore" in code or "tt." in _body(code)


def _body(code: str) -> str:
    """Without the attributes of arguments, the only place where `tt.` may be left."""
    return code[code.index("attributes {") :]


def test_a_tile_is_one_contiguous_copy_in_and_one_out(lowered: Any) -> None:
    for code in linalg(lowered):
        assert not is_indirect(code)
        assert code.count("scf.for") == 1, "one loop, over tiles"
        assert code.count("memref.load") == 2, "two scalars: where a page begins, its place"
        assert code.count("memref.copy ") == 1
        assert code.count("bufferization.materialize_in_destination") == 1
        strides = set(re.findall(r"strides: \[(.*?)\]", code))
        assert strides == {"1"}, "of everything that is read or written"


def test_an_indirect_load_would_be_seen(lowered: Any) -> None:
    assert is_indirect(lowered["gather"]["linalg"])
