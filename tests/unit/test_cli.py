# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""What the command prints and how it exits, as far as no pool is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ascend_direct import __version__
from ascend_direct.cli.main import app

runner = CliRunner()


@pytest.fixture(autouse=True)
def _no_options_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("ASCEND_DIRECT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "200")


def test_version_names_the_package_and_its_companions() -> None:
    result = runner.invoke(app, ["version"])
    assert result.exit_code == 0
    assert f"ascend-direct    {__version__}" in result.stdout
    assert "sglang" in result.stdout


def test_version_as_json_is_one_object() -> None:
    result = runner.invoke(app, ["version", "--json"])
    assert result.exit_code == 0
    versions = json.loads(result.stdout)
    assert versions["ascend-direct"] == __version__
    assert set(versions) >= {"python", "sglang", "memcache-hybrid", "torch", "torch-npu"}


@pytest.mark.parametrize(
    "arguments", [["--help"], ["pool", "--help"], ["pool", "member", "--help"]]
)
def test_help_is_there_at_every_level(arguments: list[str]) -> None:
    assert runner.invoke(app, arguments).exit_code == 0


def test_the_help_of_member_teaches_what_it_is_for_and_its_exit_codes() -> None:
    text = " ".join(runner.invoke(app, ["pool", "member", "--help"]).stdout.split())
    for words in (
        "a page lives in the memory of one member",
        "2 bad configuration",
        "3 the pool is not available",
        "--dram-size",
        "--meta-service-url",
        "--protocol",
    ):
        assert words in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give --dram-size"),
        (["--dram-size", "much"], "'much' is not a size"),
        (["--dram-size", "128GB"], "dram_size is larger than max_dram_size"),
        (["--dram-size", "1GB", "--protocol", "carrier_pigeon"], "memcache.protocol"),
        (["--dram-size", "1GB", "--meta-service-url", "host:1"], "is not tcp://host:port"),
        (["--dram-size", "1GB", "--world-size", "0"], "memcache.world_size"),
        (["--dram-size", "1GB", "--config", "{"], "--config is not JSON"),
        (["--dram-size", "1GB", "--config", "@/nowhere.json"], "cannot read"),
        (["--dram-size", "1GB", "--config", '{"memcache": {"potocol": 1}}'], "did you mean"),
    ],
)
def test_a_bad_configuration_exits_with_2_and_says_what_is_wrong(
    arguments: list[str], words: str
) -> None:
    result = runner.invoke(app, ["pool", "member", *arguments])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert "--enable-hierarchical-cache-direct cannot start" not in result.stderr


def test_an_option_wins_over_the_environment_which_wins_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ascend_direct.cli.pool import _settings

    file = tmp_path / "config.json"
    file.write_text(
        json.dumps({"memcache": {"dram_size": "1GB", "world_size": 4, "protocol": "host_shm"}})
    )
    monkeypatch.setenv("ASCEND_DIRECT_MEMCACHE__WORLD_SIZE", "8")
    monkeypatch.setenv("ASCEND_DIRECT_MEMCACHE__DRAM_SIZE", "2GB")
    settings = _settings(f"@{file}", {"dram_size": "3GB"})
    assert settings.dram_size == "3GB"
    assert settings.world_size == 8
    assert settings.protocol == "host_shm"


def test_a_machine_without_ascend_libraries_exits_with_2_and_prints_nothing_on_stdout() -> None:
    """In a process of its own: from here on the command owns its file descriptors."""
    unset = {"ASCEND_HOME_PATH", "LD_PRELOAD", "ASCEND_EMULATION"}
    done = subprocess.run(
        [sys.executable, "-m", "ascend_direct.cli.main", "pool", "member", "--dram-size", "64MB"],
        env={name: value for name, value in os.environ.items() if name not in unset},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("ascend-direct: ")
