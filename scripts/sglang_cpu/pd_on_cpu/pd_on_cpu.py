# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Lets a prefill node of SGLang send KV through Mooncake from CPU memory, for tests.

SGLang 0.5.23's Mooncake sender records a CUDA event for page numbers that it copies in the
background; without CUDA it must take the copy that waits. Owns this one choice, acts only when
SGLANG_CPU_PD=1. Test equipment: no part of `ascend_direct`.
"""

from __future__ import annotations

import os
from typing import Any

SENDER = "sglang.srt.disaggregation.mooncake.conn.MooncakeKVSender.__init__"


def register() -> None:
    """Entry point; SGLang calls it in every process it starts."""
    if os.environ.get("SGLANG_CPU_PD") != "1":
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(SENDER, _waits_for_page_numbers, HookType.AFTER)


def _waits_for_page_numbers(_result: Any, sender: Any, *_: Any, **__: Any) -> None:
    sender.supports_host_tensor_indices = False
