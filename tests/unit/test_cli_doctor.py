# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""`ascend-direct doctor` on machines with one fault each: that check says so, and no other changes.

The machine is sound apart from the fault: files of an Ascend installation that hold nothing, and a
MetaService that only answers. A real pool is tests/contract's.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ascend_direct.cli import checks, pool_checks
from ascend_direct.cli.main import app
from ascend_direct.config import MemcacheConfig
from ascend_direct.store import memcache_host

runner = CliRunner()
Checks = dict[str, dict[str, Any]]


class Machine:
    """A sound machine and pool; a fault changes one thing of it."""

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path, service: ThreadingHTTPServer):
        self.patch = patch
        self.folder = folder
        self.url = f"//127.0.0.1:{service.server_address[1]}"
        self.options: dict[str, Any] = {
            "meta_service_url": f"tcp:{self.url}",
            "config_store_url": f"tcp:{self.url}",
            "metrics_url": f"http:{self.url}",
            "protocol": "host_shm",
        }
        self.store = "memcache"
        self.answers: dict[str, Any] = service.answers  # type: ignore[attr-defined]
        self.source: str | None = None
        self.sockets: list[socket.socket] = []
        self.paths: dict[str, Path] = {}
        self._ascend()

    def _ascend(self) -> None:
        library = self.folder / "cann" / "lib64" / "libascendcl.so"
        library.parent.mkdir(parents=True)
        library.touch()
        self.patch.setenv("ASCEND_HOME_PATH", str(library.parent.parent))
        self.patch.setenv("LD_LIBRARY_PATH", str(library.parent))
        for name in list(os.environ):
            if name.startswith(("ASCEND_DIRECT_", "ASCEND_EMULATION", "SGLANG_PLUGINS")):
                self.patch.delenv(name)
        empty = self.folder / "nothing"
        empty.mkdir()
        self.paths |= {"/dev": empty, "/sys/class": empty}

        def path(*parts: Any) -> Path:
            return self.paths.get(str(parts[0]), Path(*parts)) if len(parts) == 1 else Path(*parts)

        for module in (checks, memcache_host):
            self.patch.setattr(module, "Path", path)

    def device(self, name: str, where: str) -> None:
        folder = self.folder / "hardware"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
        self.paths[where] = folder

    def version(self, distribution: str, number: str | None) -> None:
        real = importlib.metadata.version

        def version(name: str) -> str:
            if name != distribution:
                return real(name)
            if number is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return number

        self.patch.setattr(importlib.metadata, "version", version)

    def file(self, text: str, mode: int = 0o600) -> str:
        path = self.folder / "config.json"
        path.write_text(text)
        path.chmod(mode)
        return f"@{path}"

    def examine(self) -> tuple[int, Checks]:
        whole = json.dumps({"store": self.store, "memcache": self.options})
        arguments = ["doctor", "--quick", "--json", "--config", self.source or whole]
        result = runner.invoke(app, arguments)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.output
        answer = json.loads(result.stdout)
        found = {check.pop("name"): check for check in answer["checks"]}
        assert answer["ok"] == (result.exit_code == 0)
        assert len(found) == len(answer["checks"])
        return result.exit_code, found


class _MetaService(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = self.server.answers.get(self.path)  # type: ignore[attr-defined]
        text = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(404 if body is None else 200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        pass


def _cluster(expected: int = 2, world_size: int = 256) -> dict[str, Any]:
    summary = {"activeRanks": 2, "connectedLinks": 2, "expectedLinks": expected}
    server = {"groupManager": {"linkSummary": summary}, "worldSize": world_size}
    return {"mf_cluster": [{"server": server}]}


def _usage(total: int) -> dict[str, Any]:
    empty = {"total_bytes": 0, "used_bytes": 0}
    return {"cpu": {"total_bytes": total, "used_bytes": 0}, "npu": empty}


CLUSTER, USAGE = "/api/v1/mf/cluster_status", "/api/v1/capacity/usage"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Machine]:
    service = ThreadingHTTPServer(("127.0.0.1", 0), _MetaService)
    service.daemon_threads = True
    service.answers = {  # type: ignore[attr-defined]
        CLUSTER: _cluster(),
        USAGE: _usage(1 << 30),
        "/metrics/summary": "keys=7",
    }
    thread = threading.Thread(target=service.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    machine = Machine(monkeypatch, tmp_path, service)
    yield machine
    for one in machine.sockets:
        one.close()
    service.shutdown()
    service.server_close()
    thread.join()


def nobody() -> str:
    """A URL at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


def tcp(m: Machine, **options: Any) -> None:
    m.options |= {"protocol": "host_tcp", "hcom_url": nobody(), **options}


# ---- the faults: each changes a sound machine in one way ------------------------------------


def python_is_old(m: Machine) -> None:
    m.patch.setattr(checks, "OLDEST_PYTHON", (9, 9))


def torch_is_missing(m: Machine) -> None:
    m.version("torch", None)


def torch_npu_is_missing(m: Machine) -> None:
    m.device("davinci0", "/dev")


def torch_npu_is_of_another_release(m: Machine) -> None:
    m.version("torch-npu", "2.1.0")


def plugin_is_not_installed(m: Machine) -> None:
    real = importlib.metadata.entry_points
    m.patch.setattr(
        importlib.metadata,
        "entry_points",
        lambda group: () if group == checks.PLUGIN_GROUP else real(group=group),
    )


def plugin_is_not_allowed(m: Machine) -> None:
    m.patch.setenv("SGLANG_PLUGINS", "another,third")


def option_is_unknown(m: Machine) -> None:
    m.options["protokol"] = "host_shm"


def config_is_not_json(m: Machine) -> None:
    m.source = "{store: local}"


def config_file_is_missing(m: Machine) -> None:
    m.source = "@/nowhere/config.json"


def config_file_may_be_changed_by_anybody(m: Machine) -> None:
    m.source = m.file(json.dumps({"store": "memcache", "memcache": m.options}), 0o666)


def key_may_be_read_by_anybody(m: Machine) -> None:
    tls = {"enabled": True}
    for name in ("ca_path", "cert_path", "key_path"):
        path = m.folder / name
        path.touch(mode=0o644)
        tls[name] = str(path)  # type: ignore[assignment]
    m.options["tls"] = tls


def store_is_unknown(m: Machine) -> None:
    m.store = "redis"


def memcache_is_missing(m: Machine) -> None:
    m.version("memcache-hybrid", None)


def memcache_is_old(m: Machine) -> None:
    m.version("memcache-hybrid", "1.2.0")


def cann_is_missing(m: Machine) -> None:
    m.patch.delenv("ASCEND_HOME_PATH")


def runtime_library_is_missing(m: Machine) -> None:
    m.patch.setenv("LD_LIBRARY_PATH", "")
    (m.folder / "cann" / "lib64" / "libascendcl.so").unlink()


def npu_is_missing(m: Machine) -> None:
    m.options["protocol"] = "device_sdma"


def network_card_is_missing(m: Machine) -> None:
    tcp(m, protocol="host_rdma")
    m.patch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)


def shared_memory_is_small(m: Machine) -> None:
    m.options |= {"dram_size": "900000GB", "max_dram_size": "900000GB"}


def preferred_member_is_no_number(m: Machine) -> None:
    m.options["preferred_members"] = ["first"]


def certificate_is_missing(m: Machine) -> None:
    key_may_be_read_by_anybody(m)
    (m.folder / "key_path").chmod(0o600)
    (m.folder / "cert_path").unlink()


def own_address_is_of_another_host(m: Machine) -> None:
    tcp(m, hcom_url="tcp://192.0.2.77:7000")


def own_port_is_taken(m: Machine) -> None:
    taken = socket.create_server(("127.0.0.1", 0))
    m.sockets.append(taken)
    tcp(m, hcom_url=f"tcp://127.0.0.1:{taken.getsockname()[1]}")


def huge_pages_are_few(m: Machine) -> None:
    tcp(m, dram_size="1GB")
    m.patch.delenv(checks.SMALL_PAGES_ENV, raising=False)
    meminfo = m.folder / "meminfo"
    meminfo.write_text("HugePages_Free:        3\nHugepagesize:       2048 kB\n")
    m.patch.setattr(checks, "HUGE_PAGES", meminfo)


def locked_memory_is_limited(m: Machine) -> None:
    tcp(m, protocol="host_rdma")
    m.device("infiniband/card", "/sys/class")
    m.patch.setattr(resource, "getrlimit", lambda _: (65536, 65536))


def clock_is_behind(m: Machine) -> None:
    m.patch.setattr(time, "time", lambda: 3e8)


def meta_service_is_down(m: Machine) -> None:
    m.options["meta_service_url"] = nobody()


def config_store_is_down(m: Machine) -> None:
    m.options["config_store_url"] = nobody()


def metrics_url_is_another_service(m: Machine) -> None:
    m.answers.clear()


def world_size_is_another(m: Machine) -> None:
    m.answers[CLUSTER] = _cluster(world_size=16)


def nobody_gives_memory(m: Machine) -> None:
    m.answers[USAGE] = _usage(0)


def a_link_is_down(m: Machine) -> None:
    m.answers[CLUSTER] = _cluster(expected=6)


MACHINE, POOL, WARNING = 2, 3, 0
FAULTS: list[tuple[Callable[[Machine], None], str, str, int]] = [
    (python_is_old, "python", "use 9.9 or newer", MACHINE),
    (torch_is_missing, "torch", "not installed", MACHINE),
    (torch_npu_is_missing, "torch-npu", "there are NPUs", MACHINE),
    (torch_npu_is_of_another_release, "torch-npu", "2.1.0 is for another torch", MACHINE),
    (plugin_is_not_installed, "plugin", "pip install", MACHINE),
    (plugin_is_not_allowed, "plugin allow-list", "SGLANG_PLUGINS=another,third", MACHINE),
    (option_is_unknown, "configuration", "protokol", MACHINE),
    (config_is_not_json, "configuration", "--config is not JSON", MACHINE),
    (config_file_is_missing, "configuration", "cannot read the file", MACHINE),
    (config_file_may_be_changed_by_anybody, "configuration", "666", WARNING),
    (key_may_be_read_by_anybody, "configuration", "key_path has mode 644", WARNING),
    (store_is_unknown, "store", "'redis' is not installed", MACHINE),
    (memcache_is_missing, "memcache", "not installed", MACHINE),
    (memcache_is_old, "memcache", "1.2.0 is installed", MACHINE),
    (cann_is_missing, "Ascend software", "ASCEND_HOME_PATH", MACHINE),
    (runtime_library_is_missing, "Ascend software", "libascendcl.so", MACHINE),
    (npu_is_missing, "hardware", "/dev/davinci", MACHINE),
    (network_card_is_missing, "hardware", "RDMA network card", MACHINE),
    (shared_memory_is_small, "shared memory", "--shm-size", MACHINE),
    (preferred_member_is_no_number, "preferred members", "'first'", MACHINE),
    (certificate_is_missing, "TLS files", "cert_path", MACHINE),
    (own_address_is_of_another_host, "own address", "not an address of this host", MACHINE),
    (own_port_is_taken, "own address", "is in use", MACHINE),
    (huge_pages_are_few, "huge pages", "6 MiB of huge pages", MACHINE),
    (locked_memory_is_limited, "locked memory", "64 KiB", WARNING),
    (clock_is_behind, "clock", "before this package was installed", MACHINE),
    (meta_service_is_down, "MetaService", "memcache.meta_service_url", POOL),
    (config_store_is_down, "config store", "memcache.config_store_url", POOL),
    (metrics_url_is_another_service, "members", "correct metrics_url", POOL),
    (world_size_is_another, "members", "the pool's 16", MACHINE),
    (nobody_gives_memory, "members", "pool member", POOL),
    (a_link_is_down, "members", "only 2 of 6 links", WARNING),
]


def test_a_sound_machine_passes_every_check(machine: Machine) -> None:
    code, found = machine.examine()
    wrong = {name: c for name, c in found.items() if c["status"] in ("warning", "failure")}
    assert (code, wrong) == (0, {})


@pytest.mark.parametrize(("fault", "name", "words", "code"), FAULTS, ids=lambda v: str(v)[:60])
def test_the_check_of_what_is_wrong_says_so_and_no_other_does(
    machine: Machine, fault: Callable[[Machine], None], name: str, words: str, code: int
) -> None:
    fault(machine)
    ended, found = machine.examine()
    assert ended == code
    wrong = {name for name, c in found.items() if c["status"] in ("warning", "failure")}
    assert wrong == {name}, found
    assert words in found[name]["found"]
    assert found[name]["status"] == ("warning" if code == WARNING else "failure")


def test_the_text_has_a_line_for_each_check_and_the_count(machine: Machine, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    nobody_gives_memory(machine)
    config = json.dumps({"store": "memcache", "memcache": machine.options})
    result = runner.invoke(app, ["doctor", "--quick", "--config", config])
    lines = result.stdout.splitlines()
    assert result.exit_code == 3
    assert any(line.startswith("FAILURE members") for line in lines)
    assert lines[-1] == f"{len(lines) - 1} checks, 1 failed, 0 warnings"


def test_its_help_has_the_exit_codes() -> None:
    text = " ".join(runner.invoke(app, ["doctor", "--help"]).stdout.split())
    for words in ("Exit codes", "2 this machine", "3 only the pool", "--quick", "--json"):
        assert words in text


@pytest.mark.parametrize(
    ("chip", "protocol", "status", "words"),
    [
        ("Ascend910B3", "device_rdma", "ok", "A2"),
        ("Ascend910B3", "device_sdma", "failure", "use device_rdma"),
        ("Ascend910_9382", "device_sdma", "ok", "A3"),
        ("Ascend910_9382", "device_rdma", "failure", "use device_sdma"),
        ("Ascend310P", "device_sdma", "not checked", "Ascend310P"),
        (None, "device_sdma", "not checked", "no answer"),
        (None, "host_tcp", "ok", "any hardware"),
    ],
)
def test_a_device_data_path_must_be_the_chips(chip, protocol, status, words) -> None:
    config = MemcacheConfig(protocol=protocol, hcom_url="tcp://127.0.0.1:7000")
    check = pool_checks.protocol(config, chip)
    assert check.status == status
    assert words in check.found


def local(folder: Path, **more: Any) -> str:
    return json.dumps({"store": "local", "local": {"path": str(folder / "pages"), **more}})


def test_a_page_goes_to_the_pool_and_back_and_none_is_left(tmp_path: Path) -> None:
    chip, check = pool_checks.round_trip(local(tmp_path), timeout_s=60)
    assert chip is None
    assert check.status == "ok", check.found
    listing = runner.invoke(app, ["pool", "clear", "--yes", "--json", "--config", local(tmp_path)])
    assert json.loads(listing.stdout)["removed"] == 0


def test_a_pool_that_takes_no_page_is_a_failure_of_the_pool(tmp_path: Path) -> None:
    (tmp_path / "pages").write_text("a file where a directory must be")
    _, check = pool_checks.round_trip(local(tmp_path), timeout_s=60)
    assert (check.status, check.of_pool) == ("failure", True)


def test_a_trial_that_does_not_end_is_given_up(tmp_path: Path) -> None:
    _, check = pool_checks.round_trip(local(tmp_path), timeout_s=0.05)
    assert check.status == "failure"
    assert "has not ended" in check.found
