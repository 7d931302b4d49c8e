# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Lets SGLang's `torch_native` attention run MLA models, for tests on a CPU.

SGLang 0.5.23 knows no MLA handler for `torch_native` and falls back to Triton's, which expands K
and V during prefill; `torch_native` can only serve the absorbed form. Owns this one choice, acts
only when SGLANG_CPU_MLA=1 and only for `torch_native`. Test equipment: no part of `ascend_direct`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

GET_HANDLER = (
    "sglang.srt.models.deepseek_common.attention_backend_handler"
    ".AttentionBackendRegistry.get_handler"
)


def register() -> None:
    """Entry point; SGLang calls it in every process it starts."""
    if os.environ.get("SGLANG_CPU_MLA") != "1":
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(GET_HANDLER, _get_handler, HookType.AROUND)


def _get_handler(original: Callable[..., Any], registry: type, backend_name: str) -> Any:
    if backend_name == "torch_native":
        return _absorbed
    return original(registry, backend_name)


def _absorbed(attention: Any, forward_batch: Any) -> Any:
    # Imported here: register() runs before SGLang may load its models.
    from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import (
        AttnForwardMethod,
    )

    return AttnForwardMethod.MLA
