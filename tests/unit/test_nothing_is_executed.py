# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""No byte from the pool or the network becomes code: the package has no means to do so."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "ascend_direct"
MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml", "dbm", "code"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
# Attributes, whatever they belong to: torch.load, numpy.load, os.system, ...
ATTRIBUTES = {"load_module", "system", "popen", "loads_pickle", "unpickle"}
LOADERS = {("torch", "load"), ("np", "load"), ("numpy", "load"), ("np", "fromfile")}


def offences(source: str) -> Iterator[str]:
    """What in a module could turn data into code, as ``name at line``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom):
            found = [node.module] if (node.module or "").split(".")[0] in MODULES else []
        elif isinstance(node, ast.Name):
            found = [node.id] if node.id in BUILTINS else []
        elif isinstance(node, ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            bad = node.attr in ATTRIBUTES or (owner, node.attr) in LOADERS
            found = [f"{owner}.{node.attr}"] if bad else []
        elif isinstance(node, ast.keyword):
            true = isinstance(node.value, ast.Constant) and node.value.value is True
            found = [str(node.arg)] if node.arg in ("shell", "allow_pickle") and true else []
        else:
            continue
        yield from (f"{name} at {getattr(node, 'lineno', '?')}" for name in found)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_a_module_has_no_means_to_run_data(path: Path) -> None:
    assert list(offences(path.read_text())) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from marshal import loads",
        "import torch; torch.load(f)",
        "eval(text)",
        "run = exec",
        "np.load(f, allow_pickle=True)",
        "subprocess.run(text, shell=True)",
        "os.system(text)",
    ],
)
def test_the_check_sees_what_it_is_for(line: str) -> None:
    assert list(offences(line))
