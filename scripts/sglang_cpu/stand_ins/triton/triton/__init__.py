# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Importable stand-in for Triton: SGLang defines kernels at import and launches none on a CPU.

The real package (1 GB unpacked) would work, but is of no use without its devices. Every submodule
and every name exists as soon as somebody asks for it; launching a kernel raises.
"""

from __future__ import annotations

import importlib
import importlib.abc
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import FunctionType, ModuleType
from typing import Any

__version__ = "3.9.0+stand.in"


class _Kernel:
    """What `@triton.jit` makes of a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.fn = function
        self.__name__ = function.__name__
        self.__module__ = function.__module__
        self.__doc__ = function.__doc__

    def __getitem__(self, grid: Any) -> Any:
        raise RuntimeError(f"kernel {self.__name__}: the stand-in for Triton launches no kernels")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self[None]


class _AnyModule(ModuleType):
    """A module that has every name: classes for capitalised ones, submodules for the others."""

    __path__: Sequence[str] = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = _attribute(self.__name__, name)
        setattr(self, name, value)
        return value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # `tl.constexpr(1)`, but also `@helper` and `@helper(option=1)`.
        is_decorator = len(args) == 1 and not kwargs and isinstance(args[0], FunctionType | _Kernel)
        return args[0] if is_decorator else self


def _attribute(module: str, name: str) -> Any:
    if name == "active":
        # torch asks `triton.runtime.driver.active` for a device and expects this error if none is.
        raise RuntimeError("0 active drivers ([]). There should only be one.")
    if (module, name) == ("triton.backends", "backends"):
        return {}  # torch looks up in it which devices Triton serves
    if name[0].isupper():
        return type(name, (), {"__module__": module, "__init__": lambda self, *a, **k: None})
    return importlib.import_module(f"{module}.{name}")


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith("triton."):
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _AnyModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run: the names appear when they are asked for."""


sys.meta_path.insert(0, _Finder())


def jit(fn: Callable[..., Any] | None = None, **options: Any) -> Any:
    return _Kernel if fn is None else _Kernel(fn)


def _decorator(*args: Any, **kwargs: Any) -> Callable[[Any], Any]:
    return lambda kernel: kernel


autotune = heuristics = _decorator


class Config:
    """One choice of a kernel's parameters; SGLang builds lists of them at import."""

    def __init__(
        self, kwargs: dict[str, Any], num_warps: int = 4, num_stages: int = 2, **others: Any
    ) -> None:
        self.kwargs = dict(kwargs)
        self.num_warps = num_warps
        self.num_stages = num_stages


def cdiv(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)


def next_power_of_2(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return _attribute("triton", name)
