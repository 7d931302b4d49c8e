# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""What is said about a machine that cannot run the MemCache client, and how it is configured."""

from __future__ import annotations

import importlib.metadata
import logging
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

from ascend_direct.config import MemcacheConfig, TlsConfig
from ascend_direct.store import memcache_host


@pytest.fixture
def ready(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine on which nothing is missing for host_tcp."""
    (tmp_path / "lib64").mkdir()
    (tmp_path / "lib64" / "libascendcl.so").touch()
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))
    monkeypatch.delenv("ASCEND_EMULATION", raising=False)
    monkeypatch.setattr(importlib.metadata, "version", lambda _name: "1.3.0")


@pytest.mark.usefixtures("ready")
def test_a_machine_with_everything_has_no_problems() -> None:
    assert memcache_host.problems(MemcacheConfig()) == []


@pytest.mark.usefixtures("ready")
@pytest.mark.parametrize("version", ["1.2.1", "1.30.0", "2.0"])
def test_another_version_of_the_wheel_is_named_with_the_command_to_run(
    monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _name: version)
    (reason,) = memcache_host.problems(MemcacheConfig())
    assert version in reason
    assert "pip install 'ascend-direct[memcache]'" in reason


def test_a_missing_wheel_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memcache_host, "DISTRIBUTION", "memcache-hybrid-that-is-not-there")
    reasons = memcache_host.problems(MemcacheConfig())
    assert any("is not installed: pip install" in reason for reason in reasons)


@pytest.mark.usefixtures("ready")
def test_missing_driver_libraries_are_said_with_where_they_are_looked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", "")
    (tmp_path / "lib64" / "libascendcl.so").unlink()
    (reason,) = memcache_host.problems(MemcacheConfig())
    assert "libascendcl.so is not in LD_LIBRARY_PATH" in reason
    monkeypatch.delenv("ASCEND_HOME_PATH")
    (reason,) = memcache_host.problems(MemcacheConfig())
    assert "set_env.sh" in reason


@pytest.mark.usefixtures("ready")
@pytest.mark.skipif(any(Path("/dev").glob("davinci[0-9]*")), reason="this machine has an NPU")
def test_a_device_protocol_needs_an_npu() -> None:
    (reason,) = memcache_host.problems(MemcacheConfig(protocol="device_sdma"))
    assert "needs an NPU" in reason


def test_a_port_that_is_taken_is_said_to_belong_to_one_process() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        url = f"tcp://127.0.0.1:{other.getsockname()[1]}"
        reason = memcache_host.own_address_problem(url)
    assert reason is not None
    assert "each process needs a port of its own" in reason
    assert memcache_host.own_address_problem(url) is None


def test_ranks_of_an_instance_listen_at_neighbouring_ports() -> None:
    config = MemcacheConfig(hcom_url="tcp://10.0.0.1:7000")
    assert memcache_host.for_rank(config, 3).hcom_url == "tcp://10.0.0.1:7003"
    assert memcache_host.for_rank(config, 0) == config


def test_sizes_and_tls_fields_are_passed_under_the_librarys_names() -> None:
    native = SimpleNamespace(
        **{
            f"{prefix}_{name}": ""
            for prefix in ("tls", "config_store_tls", "hcom_tls")
            for name in TlsConfig.model_fields
            if (prefix, name) != ("hcom_tls", "package_path")
        }
    )
    tls = TlsConfig(enabled=True, ca_path="ca", cert_path="cert", key_path="key", package_path="p")
    config = MemcacheConfig(dram_size="1 gb", hbm_size="2GB", tls=tls)
    memcache_host.native_config(SimpleNamespace(LocalConfig=lambda: native), config)
    assert (native.dram_size, native.max_hbm_size) == (str(1 << 30), str(2 << 30))
    assert native.tls_enable is native.config_store_tls_enable is native.hcom_tls_enable is True
    assert (native.hcom_tls_key_path, native.config_store_tls_package_path) == ("key", "p")
    assert not hasattr(native, "hcom_tls_package_path")


def test_a_private_key_that_others_may_read_is_warned_about_without_its_path(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = {name: tmp_path / name for name in ("ca_path", "cert_path", "key_path")}
    for path in paths.values():
        path.touch(mode=0o644)
    tls = TlsConfig(enabled=True, **{name: str(path) for name, path in paths.items()})
    with caplog.at_level(logging.WARNING):
        memcache_host.warn_about_open_secrets(tls)
        assert "memcache.tls.key_path has mode 644" in caplog.text
        assert str(tmp_path) not in caplog.text
        caplog.clear()
        paths["key_path"].chmod(0o600)
        memcache_host.warn_about_open_secrets(tls)
        assert caplog.text == ""
        paths["ca_path"].chmod(0o664)
        memcache_host.warn_about_open_secrets(tls)
    assert "memcache.tls.ca_path has mode 664" in caplog.text
    assert "change it" in caplog.text
