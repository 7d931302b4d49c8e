# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""The device the KV pool lives on: fences, thread binding, memory kind.

The only user of torch.npu and torch.cuda. On a CPU the forward runs inline, so every fence is
already passed; the classes keep one shape so that callers need no branch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ascend_direct.store.base import Memory

ACCELERATORS = ("npu", "cuda")


class Fence(Protocol):
    """A point in the device's work; `wait` blocks the calling thread until it has passed."""

    def wait(self) -> None:
        """Return once all work recorded before the fence is done."""


@dataclass(frozen=True)
class _Events:
    events: Sequence[Any]

    def wait(self) -> None:
        for event in self.events:
            event.synchronize()


PASSED: Fence = _Events(())


class Device:
    """One accelerator of this process, or the CPU.

    Args:
        kind: torch device type of the KV pool (``cpu``, ``cuda``, ``npu``).
        index: local device number; 0 on a CPU.
        memory: what the store must take the pool's memory for; by default what the kind says.
    """

    def __init__(self, kind: str, index: int = 0, memory: Memory | None = None) -> None:
        self.kind = kind
        self.index = index
        self.memory = memory or (Memory.DEVICE if kind in ACCELERATORS else Memory.HOST)
        self._module: Any = None
        if kind in ACCELERATORS:
            import torch

            self._module = torch.get_device_module(kind)

    @classmethod
    def of(cls, name: str) -> Device:
        """The device a torch device name of this process stands for (``npu:0``, ``cuda``, ``cpu``).

        On the driver emulation posing as an A3, CPU memory is what the pool calls device memory.
        """
        import torch

        kind = torch.device(name).type
        if kind in ACCELERATORS:
            return cls(kind, torch.get_device_module(kind).current_device())
        emulated = os.environ.get("ASCEND_EMULATION") == "1"
        all_device = emulated and os.environ.get("ASCEND_EMULATION_ALL_DEVICE") == "1"
        return cls(kind, memory=Memory.DEVICE if all_device else None)

    def fence(self, forward_stream: Any = None) -> Fence:
        """Record where the current stream, and the stream the forward writes on, stand now."""
        if self._module is None:
            return PASSED
        streams = [self._module.current_stream()]
        if forward_stream is not None:
            streams.append(forward_stream)
        events = []
        for stream in streams:
            event = self._module.Event()
            event.record(stream)
            events.append(event)
        return _Events(events)

    def bind_thread(self) -> None:
        """Make this device current for the calling thread; device work there would miss it."""
        if self._module is not None:
            self._module.set_device(self.index)
