# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""The installer without the network: when it does nothing, what it mends, what it refuses."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from scripts.sglang_cpu import install
from scripts.sglang_cpu.install import (
    Environment,
    Installer,
    InstallError,
    Runner,
    check_machine,
    pins,
)

pytestmark = pytest.mark.skipif(
    sys.version_info[:2] != install.PYTHON, reason="the recipe is for Python 3.11"
)


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    made = Environment(tmp_path / "venv")
    made.site_packages.mkdir(parents=True)
    made.python.parent.mkdir()
    made.python.touch()
    return made


def add_package(site_packages: Path, name: str, *, size: int) -> Path:
    (site_packages / f"{name}.py").write_bytes(b"x" * 10)
    metadata = site_packages / f"{name}-1.dist-info"
    metadata.mkdir()
    rows = f"{name}.py,sha256=0,{size}\n{name}-1.dist-info/RECORD,,\n"
    (metadata / "RECORD").write_text(rows)
    return metadata


def stamp_all(environment: Environment) -> None:
    for part in environment.wanted:
        environment.write_stamp(part)


def test_everything_is_pinned_and_torch_can_be_replaced_by_nothing() -> None:
    for lock in (install.LOCK, install.TRITON_LOCK):
        lines = lock.read_text().splitlines()
        assert all("==" in line for line in lines if line and not line.startswith("#"))
    assert pins()["torch"] == "2.13.0"
    assert pins()["sglang"] == "0.5.23"
    assert not {"triton", "torchvision", "sglang-kernel"} & pins().keys()


def test_a_stamped_environment_needs_nothing(environment: Environment) -> None:
    parts = ["environment", "project", "triton"]
    for done in range(len(parts)):
        assert environment.missing_parts() == parts[done:]
        environment.write_stamp(parts[done])
    assert environment.missing_parts() == []


def test_another_lock_or_stand_in_needs_everything(environment: Environment) -> None:
    stamp_all(environment)
    environment.wanted["environment"] = "another"
    assert environment.missing_parts() == ["environment", "project", "triton"]


def test_another_triton_needs_only_that(environment: Environment) -> None:
    stamp_all(environment)
    environment.wanted["triton"] = "another"
    assert environment.missing_parts() == ["triton"]


def test_a_triton_that_cannot_be_had_is_left_out_and_tried_again(
    environment: Environment, capsys: pytest.CaptureFixture[str]
) -> None:
    """It serves tests only: a demo must not fail for it."""
    stamp_all(environment)
    environment.wanted["triton"] = "another"
    environment.python.write_text("#!/bin/sh\necho No matching distribution found; exit 1\n")
    environment.python.chmod(0o700)
    (step,) = Installer(environment, verbose=False).steps(environment.missing_parts())
    step.run()
    said = capsys.readouterr().out
    assert "left out" in said
    assert "pip's index lacks this version" in said
    assert environment.missing_parts() == ["triton"]
    assert not (environment.venv / install.TRITON_FOLDER).exists()


def test_the_digest_sees_each_source_but_no_build_output(tmp_path: Path) -> None:
    source = tmp_path / "package" / "module.py"
    source.parent.mkdir()
    source.write_text("a = 1\n")
    before = install.digest([source.parent])
    (source.parent / "module.pyc").write_bytes(b"0")
    assert install.digest([source.parent]) == before
    source.write_text("a = 2\n")
    assert install.digest([source.parent]) != before


def test_half_written_packages_are_forgotten_and_whole_ones_kept(environment: Environment) -> None:
    whole = add_package(environment.site_packages, "whole", size=10)
    cut_short = add_package(environment.site_packages, "cut_short", size=11)
    unrecorded = add_package(environment.site_packages, "unrecorded", size=10)
    (unrecorded / "RECORD").unlink()
    (environment.site_packages / "~old").mkdir()
    environment.forget_broken_packages()
    left = {path.name for path in environment.site_packages.glob("*.dist-info")}
    assert left == {whole.name}
    assert not cut_short.exists()
    assert not (environment.site_packages / "~old").exists()


def test_a_folder_that_is_no_environment_is_refused(tmp_path: Path) -> None:
    (tmp_path / "install.lock").touch()
    check_machine(tmp_path)
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(InstallError, match="choose another --venv"):
        check_machine(tmp_path)


def test_a_failed_command_shows_its_end_and_the_way_out(tmp_path: Path) -> None:
    run = Runner(tmp_path / "install.log", verbose=False)
    code = "print('No space left on device'); raise SystemExit(3)"
    with pytest.raises(InstallError, match="ended with code 3") as caught:
        run([sys.executable, "-c", code])
    assert "free some disk space" in str(caught.value)
    assert "goes on where it stopped" in str(caught.value)
