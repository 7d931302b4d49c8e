# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""`ascend-direct meta` runs a real MetaService, ends it in order, and says why it cannot.

Of several on Kubernetes, MemCache and its election are real. Kubernetes is stood in for by
kubernetes_api, which allows what the printed Role allows; that a Service sends clients to the
leader is Kubernetes' own.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import psutil  # type: ignore[import-untyped]
import pytest
import yaml  # type: ignore[import-untyped]
from typer.testing import CliRunner

from ascend_direct.cli.main import app
from ascend_direct.config import DirectConfig
from ascend_direct.store.meta_service import MetaServiceHttp
from tests.contract.kubernetes_api import KubernetesApi
from tests.contract.memcache_processes import ROOT

sys.path.insert(0, str(ROOT / "scripts"))

import ascend_emulation
import memcache_pool

pytestmark = [pytest.mark.memcache, pytest.mark.multi]
ENDS_IN_S = 60.0
ELECTED_IN_S = 30.0
PODS = ("metaservice-a", "metaservice-b")


@pytest.fixture
def section() -> dict[str, Any]:
    return free_section()


def free_section() -> dict[str, Any]:
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
        (("--replicas", "2"), {}, "--replicas goes with --print kubernetes"),
        (("--replicas", "2", "--print", "config"), {}, "--replicas goes with --print kubernetes"),
        (("--ha",), {}, "META_POD_NAME, META_NAMESPACE, META_LEASE_NAME not set"),
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
    (mount,) = container["volumeMounts"]
    assert mount["mountPath"] == file[1:], "a folder would hide what the image has there"
    assert mount["subPath"] == Path(file[1:]).name
    assert {port["port"] for port in service["spec"]["ports"]} == {5000, 6000, 8000}
    assert deployment["spec"]["template"]["metadata"]["labels"] == service["spec"]["selector"]


def test_manifests_without_an_image_are_refused(file: str) -> None:
    result = invoke("--print", "kubernetes", config=file)
    assert result.exit_code == 2
    assert "--image" in result.stderr


def printed(file: str, *more: str) -> list[dict[str, Any]]:
    image = ("--image", "registry.example/sglang:1")
    result = invoke("--print", "kubernetes", *image, *more, config=file)
    assert result.exit_code == 0, result.output
    return list(yaml.safe_load_all(result.stdout))


@pytest.mark.parametrize("more", [(), ("--replicas", "3"), ("--namespace", "kv")], ids=str)
def test_the_manifests_are_what_kubernetes_takes(file, more) -> None:
    objects = printed(file, *more)
    for one in objects:
        kubernetes_validate.validate(one, kubernetes_validate.latest_version(), strict=True)
    assert len({one["metadata"].get("namespace") for one in objects}) == 1


def test_replicas_are_of_one_name_and_the_service_selects_the_leader(file) -> None:
    kinds = {one["kind"]: one for one in printed(file, "--replicas", "3", "--namespace", "kv")}
    assert set(kinds) == {
        *("Deployment", "Service", "Lease", "ServiceAccount", "Role", "RoleBinding")
    }
    assert {one["metadata"]["name"] for one in kinds.values()} == {"metaservice"}
    assert {one["metadata"]["namespace"] for one in kinds.values()} == {"kv"}
    pod = kinds["Deployment"]["spec"]["template"]
    assert kinds["Deployment"]["spec"]["replicas"] == 3
    assert kinds["Deployment"]["spec"]["selector"]["matchLabels"].keys() == {"app"}
    assert pod["metadata"]["labels"] == {"app": "metaservice", "role": "backup"}
    assert kinds["Service"]["spec"]["selector"] == {"app": "metaservice", "role": "master"}
    assert pod["spec"]["serviceAccountName"] == kinds["ServiceAccount"]["metadata"]["name"]
    (subject,) = kinds["RoleBinding"]["subjects"]
    assert (subject["name"], subject["namespace"]) == ("metaservice", "kv")
    (container,) = pod["spec"]["containers"]
    assert container["command"][-1] == "--ha"
    values = {entry["name"]: entry for entry in container["env"]}
    assert values["META_LEASE_NAME"]["value"] == kinds["Lease"]["metadata"]["name"]
    paths = {"META_POD_NAME": "metadata.name", "META_NAMESPACE": "metadata.namespace"}
    for name, path in paths.items():
        assert values[name]["valueFrom"]["fieldRef"]["fieldPath"] == path


def test_the_addresses_that_the_manifests_name_are_ones_that_servers_take(file) -> None:
    text = invoke("--print", "kubernetes", "--image", "i", "--namespace", "kv", config=file).stdout
    (line,) = (line for line in text.splitlines() if "name the Service" in line)
    meta, store, metrics = line.partition(": ")[2].split(", ")
    named = {"meta_service_url": meta, "config_store_url": store, "metrics_url": metrics}
    assert DirectConfig.load({"memcache": named}).memcache.meta_service_url == meta
    assert "metaservice.kv:5000" in meta


def test_a_unit_for_one_of_several_is_refused(file) -> None:
    result = invoke("--print", "systemd", "--ha", config=file)
    assert result.exit_code == 2
    assert "--print kubernetes --replicas 2" in result.stderr


def test_one_replica_of_several_is_refused(file) -> None:
    result = invoke("--print", "kubernetes", "--image", "i", "--ha", config=file)
    assert result.exit_code == 2
    assert "--replicas 2" in result.stderr


def test_memcaches_own_file_switches_its_election_on() -> None:
    lines = invoke("--print", "config", "--ha").stdout.splitlines()
    assert "ock.mmc.meta.ha.enable = true" in lines


@pytest.fixture
def api(file: str) -> Iterator[KubernetesApi]:
    made = KubernetesApi(printed(file, "--replicas", "2"), PODS)
    yield made
    made.close()


def healthy(url: str) -> bool:
    http = MetaServiceHttp(url)
    try:
        return http.usage() is not None
    finally:
        http.close()


def the_leader(api: KubernetesApi) -> str:
    deadline_s = time.monotonic() + ELECTED_IN_S
    while time.monotonic() < deadline_s:
        if leaders := api.pods_labelled(app="metaservice", role="master"):
            assert len(leaders) == 1
            return leaders[0]
        time.sleep(0.2)
    raise AssertionError(f"nobody became the leader; refused: {api.refused}")


@pytest.mark.timeout(180)
def test_one_of_two_becomes_the_leader_and_the_other_when_it_is_killed(
    api: KubernetesApi, environment, tmp_path: Path
) -> None:
    kubeconfig = str(api.kubeconfig(tmp_path / "kubeconfig"))
    election = {"META_NAMESPACE": api.namespace, "META_LEASE_NAME": "metaservice"}
    processes: dict[str, subprocess.Popen[str]] = {}
    urls: dict[str, str] = {}
    try:
        for pod in PODS:
            own = {"META_POD_NAME": pod, "KUBECONFIG": kubeconfig, **election}
            folder = tmp_path / pod  # as a pod has: MemCache allows one MetaService per host
            folder.mkdir()
            own["ASCEND_EMULATION_RUN_DIR"] = str(folder)
            ports = free_section()
            processes[pod] = start(ports, {**environment, **own}, folder, "--ha")
            urls[pod] = ports["metrics_url"]
            assert first_line(processes[pod])["event"] == "ready"
        first = the_leader(api)
        (second,) = set(PODS) - {first}
        assert all(healthy(url) for url in urls.values()), "a backup is ready too"
        processes[first].kill()
        processes[first].communicate(timeout=ENDS_IN_S)
        api.delete_pod(first)
        assert the_leader(api) == second
        assert healthy(urls[second])
    finally:
        for process in processes.values():
            process.terminate()
            process.communicate(timeout=ENDS_IN_S)
    assert api.refused == [], "the Role covers what the election does"
    assert processes[second].returncode == 0
