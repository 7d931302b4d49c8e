# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Published figures of Ascend devices and of MemCache pools on them: table values, rung E0.

Nothing here was measured by this project. A rank is a card on A2, a die on A3. Lines of loads and
stores are fits through charts of the MemCache repository: two nodes, 8 to 40 objects of 8.57 MiB
in 122 fragments a call, every device of the node busy (A2: 8 cards, device_rdma; A3: 16 dies,
device_sdma). Objects in smaller fragments take longer.
"""

from __future__ import annotations

from dataclasses import dataclass

OBJECT_BYTES = 8.57 * (1 << 20)
GIB = 1 << 30


@dataclass(frozen=True)
class Line:
    """What a call of a rank takes: ``fixed_ms + bytes / bytes_per_s``."""

    fixed_ms: float
    bytes_per_s: float


def _line(fixed_ms: float, object_ms: float) -> Line:
    return Line(fixed_ms, OBJECT_BYTES / (object_ms / 1e3))


@dataclass(frozen=True)
class Hardware:
    """One kind of device.

    Attributes:
        flops: dense BF16 peak of a rank.
        utilisation: share of it that prefill is taken to reach.
        exchange_bytes_per_s: between ranks of a server, for MLA pages that each rank reads a share
            of; None where no figure is at hand, and each rank is then taken to read all.
    """

    title: str
    hbm_bytes: int
    flops: float
    utilisation: float
    load: Line
    store: Line
    exchange_bytes_per_s: float | None


# Share of the peak: published prefill rates of DeepSeek-R1 lie between 0.12 (a pull request's
# baseline without overlap or graphs) and 0.66 (CloudMatrix384, INT8 counted as BF16).
UTILISATION = 0.45
HARDWARE = {
    "a2": Hardware(
        title="Ascend 910B (A2), device_rdma",
        hbm_bytes=64 * GIB,
        flops=376e12,
        utilisation=UTILISATION,
        load=_line(0.60, 0.380),
        store=_line(0.71, 0.387),
        exchange_bytes_per_s=None,
    ),
    "a3": Hardware(
        title="Ascend 910C die (A3), device_sdma",
        hbm_bytes=64 * GIB,
        flops=376e12,
        utilisation=UTILISATION,
        load=_line(1.02, 0.171),
        store=_line(0.96, 0.186),
        exchange_bytes_per_s=196e9,
    ),
}
# An exists call for some dozen keys: MetaService is a CPU program, measured on the emulation (E2).
LOOKUP_MS = 0.3
# Not measured: launches and sampling of one request.
REQUEST_MS = 5.0
# Not measured: only decides when an answer's pages can be found.
ANSWER_MS_PER_TOKEN = 30.0
