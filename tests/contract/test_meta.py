# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""`ascend-direct meta` runs a real MetaService, ends it in order, and says why it cannot."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import yaml  # type: ignore[import-untyped]
from typer.testing import CliRunner

from ascend_direct.cli.main import app
from tests.contract.memcache_processes import ROOT

sys.path.insert(0, str(ROOT / "scripts"))

import ascend_emulation
import memcache_pool

pytestmark = [pytest.mark.memcache, pytest.mark.multi]
ENDS_IN_S = 60.0


@pytest.fixture
def section() -> dict[str, Any]:
    meta, store, metrics = memcache_pool.free_ports(3)
    return {
        "meta_service_url": f"tcp://127.0.0.1:{meta}",
        "config_store_url": f"tcp://127.0.0.1:{store}",
        "metrics_url": f"http://127.0.0.1:{metrics}",
        "max_dram_size": "64MB",
    }


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    run_dir = ascend_emulation.private_run_dir()
    yield {
        **os.environ,
        **ascend_emulation.environment(ascend_emulation.build(), run_dir, protocol="host_shm"),
    }
    shutil.rmtree(run_dir, ignore_errors=True)


def start(
    section: dict[str, Any], environment: dict[str, str], folder: Path, *more: str
) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ascend_direct.cli.main", "meta", "--json"]
    command += ["--config", json.dumps({"memcache": section}), "--log-dir", str(folder), *more]
    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )


def first_line(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.communicate(timeout=ENDS_IN_S)[1][-2000:]
    event: dict[str, Any] = json.loads(line)
    return event


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_it_says_when_it_is_ready_serves_a_member_and_ends_with_0(
    section, environment, tmp_path: Path, number
) -> None:
    process = start(section, environment, tmp_path)
    try:
        event = first_line(process)
        assert event["event"] == "ready"
        assert event["meta_service_url"] == section["meta_service_url"]
        stats = CliRunner().invoke(
            app, ["pool", "stats", "--json", "--config", json.dumps({"memcache": section})]
        )
        assert stats.exit_code == 0, stats.output
        assert json.loads(stats.stdout)["keys"] == 0
        process.send_signal(number)
        out, err = process.communicate(timeout=ENDS_IN_S)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, err[-2000:]
    assert json.loads(out)["event"] == "ended"
    again = start(section, environment, tmp_path)  # its ports are free
    try:
        assert first_line(again)["event"] == "ready"
    finally:
        again.terminate()
        again.communicate(timeout=ENDS_IN_S)


def test_a_second_one_is_told_that_its_ports_are_taken(
    section, environment, tmp_path: Path
) -> None:
    first = start(section, environment, tmp_path)
    try:
        first_line(first)
        second = start(section, environment, tmp_path)
        _, err = second.communicate(timeout=ENDS_IN_S)
        assert second.returncode == 2
        for name in ("meta_service_url", "config_store_url", "metrics_url"):
            assert f"memcache.{name}: nobody can listen at {section[name]}" in err
    finally:
        first.terminate()
        first.communicate(timeout=ENDS_IN_S)


def test_a_command_that_is_killed_does_not_leave_its_service_behind(
    section, environment, tmp_path: Path
) -> None:
    process = start(section, environment, tmp_path)
    first_line(process)
    (service,) = psutil.Process(process.pid).children()
    process.kill()
    process.communicate(timeout=ENDS_IN_S)
    assert psutil.wait_procs([service], timeout=ENDS_IN_S)[1] == []


def test_one_that_does_not_start_ends_with_3_and_names_its_log(
    section, environment, tmp_path: Path
) -> None:
    (tmp_path / "memcache_hybrid.py").write_text("raise ImportError('cannot be loaded')")
    process = start(section, {**environment, "PYTHONPATH": str(tmp_path)}, tmp_path)
    _, err = process.communicate(timeout=ENDS_IN_S)
    assert process.returncode == 3, err
    assert "cannot be loaded" in err
    assert f"its log is in {tmp_path}" in err


def invoke(*arguments: str, config: str = "{}") -> Any:
    return CliRunner().invoke(app, ["meta", "--config", config, *arguments])


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        (("--evict-above", "70"), {}, "--evict-to 80, --evict-above 70"),
        (("--evict-above", "101"), {}, "1 … 100"),
        ((), {"config_store_url": "tcp://127.0.0.1:5000"}, "give each its own port"),
        ((), {"meta_service_url": "tcp://192.0.2.7:5000"}, "nobody can listen at tcp://192.0.2.7"),
        (("--log-dir", "/proc/no"), {}, "--log-dir /proc/no"),
        (("--print", "systemd"), {}, "@/path/to/file"),
    ],
)
def test_wrong_settings_end_with_2_and_the_way_out(arguments, options, words) -> None:
    result = invoke(*arguments, config=json.dumps({"memcache": options}))
    assert result.exit_code == 2
    assert words in result.stderr


def test_a_file_for_memcaches_own_launcher_names_the_pools_addresses() -> None:
    result = invoke(
        *("--print", "config", "--evict-to", "60"),
        config='{"memcache": {"meta_service_url": "tcp://10.0.0.1:5000"}}',
    )
    settings = dict(line.split(" = ") for line in result.stdout.splitlines())
    assert settings["ock.mmc.meta_service_url"] == "tcp://10.0.0.1:5000"
    assert settings["ock.mmc.meta_service.metrics_url"] == "http://10.0.0.1:8000"
    assert settings["ock.mmc.evict_threshold_low"] == "60"


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "ascend_direct.json"
    path.write_text('{"memcache": {"meta_service_url": "tcp://10.0.0.1:5000"}}')
    path.chmod(0o600)
    return f"@{path}"


def test_the_unit_starts_this_command_with_the_file(file: str) -> None:
    unit = invoke("--print", "systemd", config=file).stdout
    (line,) = (line for line in unit.splitlines() if line.startswith("ExecStart="))
    assert f"ascend-direct meta --config {file} --evict-above 90" in line
    assert "\n[Install]\n" in unit


def test_the_manifests_are_yaml_that_starts_this_command_at_the_pods_address(file: str) -> None:
    result = invoke("--print", "kubernetes", "--image", "registry.example/sglang:1", config=file)
    deployment, service = yaml.safe_load_all(result.stdout)
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert container["command"][:4] == ["ascend-direct", "meta", "--config", file]
    values = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert values["ASCEND_DIRECT_MEMCACHE__META_SERVICE_URL"] == "tcp://$(POD_IP):5000"
    assert values["ASCEND_DIRECT_MEMCACHE__METRICS_URL"] == "http://$(POD_IP):8000"
    assert container["volumeMounts"][0]["mountPath"] == str(Path(file[1:]).parent)
    assert {port["port"] for port in service["spec"]["ports"]} == {5000, 6000, 8000}
    assert deployment["spec"]["template"]["metadata"]["labels"] == service["spec"]["selector"]


def test_manifests_without_an_image_are_refused(file: str) -> None:
    result = invoke("--print", "kubernetes", config=file)
    assert result.exit_code == 2
    assert "--image" in result.stderr
