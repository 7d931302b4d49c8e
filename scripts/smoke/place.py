# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Where the smoke test runs: what a pool and a server need there.

Owns the difference between a machine with NPUs and the emulation on a CPU, and nothing else: the
steps are the same. The NPU half has been read, not run (rung E0).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from sglang_cpu.models import make_model
from sglang_cpu.server import CPU_ARGS, SGLangServer, cpu_environment
from two_instances.cluster import PATIENCE, MemcachePool, Progress, linked_args

NPU_ARGS = ("--device", "npu", "--attention-backend", "ascend")
START_TIMEOUT_S = 1800.0


def npu_environment(_model: Path, _tp_size: int, extra: Mapping[str, str]) -> dict[str, str]:
    """The caller's environment as it is: CANN's set_env.sh has been sourced."""
    return {**os.environ, **extra}


class Place:
    """One kind of machine.

    Args:
        protocol: MemCache data path.
        tp_size: ranks of each server; on NPUs B's follow A's.
        pool_size: DRAM that the pool's member gives.
    """

    def __init__(self, *, emulated: bool, protocol: str, tp_size: int, pool_size: str) -> None:
        self.emulated = emulated
        self.kind = "driver emulation on a CPU (E2; not an NPU result)" if emulated else "NPU (E5)"
        self.protocol = protocol
        self._tp_size = tp_size
        self._pool_size = pool_size

    def pool(self) -> MemcachePool:
        """A pool of one member on this machine, not started."""
        return MemcachePool(self.protocol, member_size=self._pool_size, emulated=self.emulated)

    def model(self, family: str, given: Path | None, folder: Path) -> Path:
        """The user's model; emulated, a tiny one made on the spot unless one is given."""
        if given is not None:
            return given
        if not self.emulated:
            raise ValueError(f"--{family}-model is needed: the folder of a {family.upper()} model")
        return make_model(folder / family, family)

    def server(
        self, pool: MemcachePool, model: Path, number: int, page_size: int, log: Path, say: Progress
    ) -> SGLangServer:
        """Server `number`, not started."""
        direct = PATIENCE if self.emulated else {}
        args = ["--page-size", str(page_size), *linked_args({**pool.options(), **direct})]
        if not self.emulated:
            args += ["--base-gpu-id", str(number * self._tp_size)]
        return SGLangServer(
            model,
            args,
            env={"SGLANG_PLUGINS": "ascend_direct", **pool.environment()},
            tp_size=self._tp_size,
            name="AB"[number],
            log_path=log,
            progress=say,
            start_timeout_s=START_TIMEOUT_S,
            machine_args=CPU_ARGS if self.emulated else NPU_ARGS,
            environment=cpu_environment if self.emulated else npu_environment,
        )
