# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""The layers and the line budget of docs/design.md, checked on the source."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "ascend_direct"
MAX_MODULE_LINES = 400
MAX_FUNCTION_LINES = 45
MAX_CORE_LINES = 3000
MAX_STORE_LINES = 700

# A unit may import its own layer or a lower one.
LAYER = {
    "names": 0,
    "errors": 0,
    "config": 0,
    "config_text": 0,
    "page_key": 0,
    "page_layout": 0,
    "model_identity": 0,
    "metrics": 0,
    "beliefs": 0,
    "admission": 0,
    "store": 1,
    "device": 1,
    "transfer": 2,
    "integration": 3,
    "cli": 4,
    "plugin": 4,
    "__init__": 4,
}
ONLY_IN = {
    "sglang": {"integration", "plugin"},
    "memcache_hybrid": {"store"},
    "torch_npu": {"device"},
}
MODULES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = sorted((PACKAGE.parent / "scripts").rglob("*.py"))
# Modules that only servers with an option run; not in the core's budget, nor in a store's.
OPTIONAL = {
    "admission.py": "admission: cost",
    "integration/costs.py": "admission: cost",
    "integration/lookahead.py": "load_mode: lookahead",
    "integration/prometheus.py": "--enable-metrics",
    "store/attach.py": "on_pool_unavailable: degrade",
    "store/memcache_clear.py": "pool clear",
    "store/memcache_meta.py": "ascend-direct meta",
    "store/meta_service_stats.py": "pool stats",
    "integration/decode_offload.py": "--disaggregation-mode decode",
    "store/packed.py": "transfer: packed, and auto where it measures",
    "store/page_packer.py": "transfer: packed, where the KV pool is host memory",
    "store/device_page_packer.py": "transfer: packed, where the KV pool is on an NPU or a GPU",
    "store/copy_fragments.py": "transfer: packed, as device_page_packer",
    "store/verified.py": "verify: sample, all",
    "store/device_copy.py": "verify, where the KV pool is device memory",
}
# Rows, not code: read one at a time, and printed in docs/design.md.
TABLES = {"integration/seam_table.py"}


def unit(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def code_lines(path: Path) -> int:
    """Lines that hold code: were documentation counted, the budget would be paid with it."""
    text = path.read_text()
    prose = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(getattr(node.value, "value", None), str):
            prose |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return sum(
        1
        for number, line in enumerate(text.splitlines(), 1)
        if number not in prose and line.strip() and not line.lstrip().startswith("#")
    )


def store_of(path: Path) -> str | None:
    """The store that a module of store/ belongs to; None for the protocol."""
    if unit(path) != "store" or path.stem in ("__init__", "base", "choice") or is_optional(path):
        return None
    return "local" if path.stem.startswith(("local", "host_copy")) else "memcache"


def is_optional(path: Path) -> bool:
    return str(path.relative_to(PACKAGE)) in OPTIONAL


def is_core(path: Path) -> bool:
    is_table = str(path.relative_to(PACKAGE)) in TABLES
    return unit(path) != "cli" and store_of(path) is None and not is_optional(path) and not is_table


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "use absolute imports"
            yield (
                f"{node.module}.{node.names[0].name}"
                if node.module == "ascend_direct"
                else (node.module or "")
            )


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    me = unit(path)
    for name in imports(ast.parse(path.read_text())):
        root, *rest = name.split(".")
        assert me in ONLY_IN.get(root, {me}), f"{me} may not import {root}"
        if root == "ascend_direct" and rest and rest[0] in LAYER:
            assert LAYER[rest[0]] <= LAYER[me], f"{me} imports up: {name}"


def test_every_unit_has_a_layer() -> None:
    assert {unit(path) for path in MODULES} <= set(LAYER)


def test_the_entry_point_imports_only_the_standard_library() -> None:
    tree = ast.parse((PACKAGE / "plugin.py").read_text())
    top = ast.Module(
        body=[n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)], type_ignores=[]
    )
    names = set(imports(top)) - {"ascend_direct.names"}  # which imports nothing
    assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names
    assert not list(imports(ast.parse((PACKAGE / "names.py").read_text())))


def test_only_the_device_module_names_an_accelerator() -> None:
    for path in MODULES:
        if unit(path) != "device":
            for word in ("torch.npu", "torch.cuda"):
                assert word not in path.read_text(), f"{path.name} uses {word}"


def test_modules_stay_short() -> None:
    lines = {str(path): len(path.read_text().splitlines()) for path in (*MODULES, *SCRIPTS)}
    assert {path: n for path, n in lines.items() if n > MAX_MODULE_LINES} == {}


def test_the_core_can_be_read_in_one_sitting() -> None:
    """The core is what every server runs; commands and single stores are read when needed."""
    assert sum(code_lines(path) for path in MODULES if is_core(path)) <= MAX_CORE_LINES


def test_optional_modules_exist_and_name_their_option() -> None:
    for name, option in OPTIONAL.items():
        assert option.split(":")[0].split(",")[0] in (PACKAGE / name).read_text(), name


def test_each_store_stays_small() -> None:
    for name in ("local", "memcache"):
        assert (
            sum(code_lines(path) for path in MODULES if store_of(path) == name) <= MAX_STORE_LINES
        )


def test_functions_stay_short() -> None:
    long = {}
    for path in (*MODULES, *SCRIPTS):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                size = (node.end_lineno or 0) - node.lineno + 1
                if size > MAX_FUNCTION_LINES:
                    long[f"{path.name}:{node.name}"] = size
    assert long == {}


def test_every_file_says_what_it_owns_and_carries_the_licence() -> None:
    for path in (*MODULES, *SCRIPTS):
        text = path.read_text()
        assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n"), path
        assert ast.get_docstring(ast.parse(text)), f"{path} has no docstring"
