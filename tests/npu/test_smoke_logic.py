# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""The logic of scripts/npu_smoke without an NPU: it passes emulated, never by skipping."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 900  # BACK_TIMEOUT_S and two server starts on a busy machine


@pytest.mark.sglang
@pytest.mark.memcache
@pytest.mark.e2e
@pytest.mark.timeout(TIMEOUT_S)
def test_emulated_every_step_passes_and_the_report_says_that_it_is_no_npu(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "smoke", "--emulated", "--prompts", "2", "--out", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "scripts")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    failed = [line for line in done.stdout.splitlines() if ": failed" in line]
    assert done.returncode == 0, [*failed, done.stdout[-4000:]]
    report = json.loads((tmp_path / "report.json").read_text())
    assert "not an NPU result" in report["machine"]
    steps = {step["step"]: step for step in report["steps"]}
    for name in ("pool", "servers", "repeat", "fault", "bench"):
        assert steps[f"gqa: {name}"]["status"] == "passed", steps
    assert steps["gqa: repeat"]["facts"]["identical"] == 2
    assert not steps["gqa: bench"]["facts"]["judged"]
    assert report["versions"]["sglang"]


def test_an_interpreter_without_the_package_is_told_from_a_failure(tmp_path: Path) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    done = subprocess.run(
        [ROOT / "scripts" / "npu_smoke", "--help"],
        env={**os.environ, "PYTHON": str(bare), "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "set PYTHON" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.sglang
def test_a_failed_step_fails_the_run_and_so_does_no_step_at_all() -> None:
    from smoke.__main__ import Smoke, parse
    from smoke.place import Place
    from smoke.steps import StepFailed

    def run(emulated: bool, *errors: Exception | None) -> bool:
        place = Place(emulated=emulated, protocol="host_shm", tp_size=1, pool_size="1GB")
        smoke = Smoke(place, parse(["--emulated"]), Console(quiet=True))
        for number, error in enumerate(errors):

            def body(error: Exception | None = error) -> dict[str, Any]:
                if error is not None:
                    raise error
                return {}

            smoke._step(str(number), body)
        return smoke.ok

    assert run(False, None)
    assert run(True, None)
    assert not run(True, None, StepFailed("wrong answer"))
    assert not run(False)


@pytest.mark.sglang
def test_sglangs_collector_finds_the_npu_test_in_its_suite() -> None:
    from sglang.test.ci.ci_register import HWBackend, collect_tests

    path = Path(__file__).with_name("test_ascend_direct_npu.py")
    [found] = collect_tests([str(path)], sanity_check=True)
    assert (found.backend, found.suite, found.nightly) == (
        HWBackend.NPU,
        "nightly-4-npu-a3",
        True,
    )


def test_without_an_npu_the_command_ends_with_advice(tmp_path: Path) -> None:
    if any((Path(entry) / "torch_npu").exists() for entry in sys.path):
        pytest.skip("torch_npu is here")
    done = subprocess.run(
        [sys.executable, "-m", "smoke", "--protocol", "device_sdma", "--out", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT / "scripts")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "--emulated" in done.stdout
