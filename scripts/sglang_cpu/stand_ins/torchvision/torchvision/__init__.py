# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Importable stand-in for torchvision: enough for SGLang and transformers to be imported.

The registry's wheel is built for CUDA and refuses to load beside a CPU build of torch. Text models
never call into it; whoever does is told so (`_placeholder`).
"""

from . import io, ops, transforms

__all__ = ["io", "ops", "transforms"]
__version__ = "0.28.0+stand.in"
