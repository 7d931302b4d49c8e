# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""scripts/npu_smoke on a machine with NPUs, as SGLang's NPU jobs register and lay out their tests.

    ASCEND_DIRECT_GQA_MODEL=… ASCEND_DIRECT_MLA_MODEL=… ASCEND_DIRECT_PROTOCOL=device_sdma \
        python -m pytest tests/npu --require=npu

Written, not run on an NPU (rung E0).
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import unittest
from pathlib import Path

import pytest
from sglang.test.ci.ci_register import register_npu_ci

register_npu_ci(est_time=1800, suite="nightly-4-npu-a3", nightly=True)

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 3600


@pytest.mark.npu
@pytest.mark.sglang
@pytest.mark.memcache
@pytest.mark.timeout(TIMEOUT_S)
class TestAscendDirectOnNPU(unittest.TestCase):
    """GQA and MLA, two servers each, on one pool."""

    def test_every_step_passes(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            command = [str(ROOT / "scripts" / "npu_smoke"), "--out", folder]
            command += ["--protocol", os.environ["ASCEND_DIRECT_PROTOCOL"]]
            command += ["--gqa-model", os.environ["ASCEND_DIRECT_GQA_MODEL"]]
            command += ["--mla-model", os.environ["ASCEND_DIRECT_MLA_MODEL"]]
            command += ["--tp", os.environ.get("ASCEND_DIRECT_TP", "2")]
            done = subprocess.run(command, timeout=TIMEOUT_S, check=False)
            report = json.loads((Path(folder) / "report.json").read_text())
        assert done.returncode == 0, report
        assert {step["status"] for step in report["steps"]} == {"passed"}, report


if __name__ == "__main__":
    unittest.main()
