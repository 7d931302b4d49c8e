# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Can this machine run the MemCache client as configured? Reasons, each with what to do.

Owns the checks that need no pool and no native code (wheel, driver libraries, hardware for the
protocol, room in shared memory, TLS files), and our configuration in the native client's words. The
checks come first because the native client answers every such fault with -1, after seconds to
minutes. Nothing here opens a library or reads a secret.
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import errno
import importlib.metadata
import logging
import os
import signal
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ascend_direct.config import MIB, MemcacheConfig, TlsConfig, parse_bytes

logger = logging.getLogger(__name__)

DISTRIBUTION = "memcache-hybrid"
SUPPORTED = "1.3."
EMULATION_ENV = "ASCEND_EMULATION"
EMULATION_RUN_DIR_ENV = "ASCEND_EMULATION_RUN_DIR"
# What the native client takes over when it is made, to clean up and die.
TAKEN_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
_SECRETS = ("key_path", "key_pass_path")
# Larger than `struct sigaction` anywhere: it is saved and put back unread.
_SIGACTION_BYTES = 512
INSTALL = "pip install 'ascend-direct[memcache]'"


def problems(config: MemcacheConfig) -> list[str]:
    """Every reason why the client cannot work here; [] if none is known."""
    return [reason for reasons in problems_by_name(config).values() for reason in reasons]


def problems_by_name(config: MemcacheConfig) -> dict[str, list[str]]:
    """The same, by what was looked at."""
    return {
        "memcache": list(_wheel()),
        "Ascend software": list(_driver()),
        "hardware": list(_hardware(config)),
        "shared memory": list(_shared_memory(config)),
        "preferred members": list(_members(config)),
        "TLS files": list(_tls(config.tls)),
    }


def own_address_problem(url: str) -> str | None:
    """Why this process cannot listen at its own `hcom_url`; None if it can."""
    parts = urlsplit(url)
    family = socket.AF_INET6 if ":" in (parts.hostname or "") else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As a server does: connections of the process before, in TIME_WAIT, do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((parts.hostname, parts.port))
        except OSError as error:
            why = {
                errno.EADDRINUSE: "is in use: each process needs a port of its own",
                errno.EADDRNOTAVAIL: "is not an address of this host",
            }.get(error.errno or 0, f"cannot be listened at ({error})")
            return f"memcache.hcom_url: {url} {why}; set ASCEND_DIRECT_MEMCACHE__HCOM_URL here."
    return None


def is_emulated() -> bool:
    """The Ascend driver of this process is the repository's stand-in."""
    return os.environ.get(EMULATION_ENV, "") not in ("", "0")


def _wheel() -> Iterator[str]:
    try:
        version = importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        yield f'{DISTRIBUTION} is not installed: {INSTALL}, or set "store": "local".'
        return
    if not version.startswith(SUPPORTED):
        yield f"{DISTRIBUTION} {version} is installed, {SUPPORTED}x is needed: {INSTALL}."


def _driver() -> Iterator[str]:
    home = os.environ.get("ASCEND_HOME_PATH", "")
    folders = [*os.environ.get("LD_LIBRARY_PATH", "").split(":"), home and f"{home}/lib64"]
    found = any(folder and Path(folder, "libascendcl.so").exists() for folder in folders)
    if not home or not Path(home, "lib64").is_dir():
        yield (
            "ASCEND_HOME_PATH does not name a CANN installation: source its set_env.sh, or, to try "
            "things without an NPU, start the process with scripts/ascend_emulation.py."
        )
    elif not found and ctypes.util.find_library("ascendcl") is None:
        yield (
            "the Ascend runtime library libascendcl.so is not in LD_LIBRARY_PATH: source CANN's "
            "set_env.sh before the server starts."
        )


def _hardware(config: MemcacheConfig) -> Iterator[str]:
    protocol = config.protocol
    if protocol == "device_rdma" and is_emulated():
        yield "memcache.protocol device_rdma is not emulated: use host_shm, host_tcp, device_sdma."
    elif protocol.startswith("device_") and not is_emulated():
        if not any(Path("/dev").glob("davinci[0-9]*")):
            yield (
                f"memcache.protocol {protocol} needs an NPU, and this machine shows no "
                "/dev/davinci*: give the container its devices, or use host_tcp."
            )
    elif protocol == "host_rdma" and not any(Path("/sys/class").glob("infiniband/*")):
        yield (
            "memcache.protocol host_rdma needs an RDMA network card, and /sys/class/infiniband is "
            "empty: use host_tcp."
        )


def _shared_memory(config: MemcacheConfig) -> Iterator[str]:
    """Memory past the bound of a tmpfs is promised, and kills the process when it is touched."""
    wanted = parse_bytes(config.dram_size)
    if config.protocol != "host_shm" or not wanted:
        return
    where = (is_emulated() and os.environ.get(EMULATION_RUN_DIR_ENV)) or "/dev/shm"
    try:
        room = os.statvfs(where)
    except OSError as error:
        yield f"memcache.protocol host_shm needs {where}: {error.strerror}."
        return
    free = room.f_bavail * room.f_frsize
    if free < wanted:
        yield (
            f"memcache.dram_size is {wanted // MIB} MiB but {where} has {free // MIB} MiB free: "
            "lower it, or give the container more (--shm-size)."
        )


def _members(config: MemcacheConfig) -> Iterator[str]:
    wrong = [member for member in config.preferred_members if not member.isdecimal()]
    if wrong:
        yield (
            f"memcache.preferred_members: {', '.join(map(repr, wrong))} is no member's id: use the "
            "number that `ascend-direct pool member` prints."
        )


def _tls(tls: TlsConfig) -> Iterator[str]:
    """The options are named, their paths are not: these messages end up in logs."""
    if not tls.enabled:
        return
    for option in ("ca_path", "ca_crl_path", "cert_path", "key_path", "key_pass_path"):
        value = getattr(tls, option)
        if value and not (os.path.isfile(value) and os.access(value, os.R_OK)):
            yield f"memcache.tls.{option} is not a file that this process may read: set it."
    if tls.decrypter_path and not os.path.isfile(tls.decrypter_path):
        yield "memcache.tls.decrypter_path is not a file: set it."
    if tls.package_path and not os.path.isdir(tls.package_path):
        yield "memcache.tls.package_path is not a directory: set it."


def warn_about_open_secrets(tls: TlsConfig) -> None:
    """Log which files of TLS others than their owner may read, where secret, or change."""
    if not tls.enabled:
        return
    for option in sorted(TlsConfig.model_fields.keys() - {"enabled"}):
        value = getattr(tls, option)
        try:
            mode = stat.S_IMODE(os.stat(value).st_mode) if value else 0
        except OSError:  # gone since it was checked; its error would tell the path
            continue
        if option in _SECRETS and mode & (stat.S_IRWXG | stat.S_IRWXO):
            advice = "only its owner should read it (chmod 600)"
        elif mode & (stat.S_IWGRP | stat.S_IWOTH):
            advice = "only its owner should change it (chmod go-w)"
        else:
            continue
        logger.warning("memcache.tls.%s has mode %03o: %s", option, mode, advice)


@contextlib.contextmanager
def signal_handlers_kept() -> Iterator[None]:
    """Put the process's signal handlers back: they are the server's, not the native client's.

    By way of libc, because Python lets only the main thread set a handler.
    """
    libc = ctypes.CDLL(None)
    saved = {number: ctypes.create_string_buffer(_SIGACTION_BYTES) for number in TAKEN_SIGNALS}
    for number, action in saved.items():
        libc.sigaction(number, None, action)
    try:
        yield
    finally:
        for number, action in saved.items():
            libc.sigaction(number, action, None)


def for_rank(config: MemcacheConfig, rank: int) -> MemcacheConfig:
    """Ranks of an instance share a configuration, but each listens at a port of its own."""
    parts = urlsplit(config.hcom_url)
    head = config.hcom_url.rpartition(":")[0]
    return config.model_copy(update={"hcom_url": f"{head}:{(parts.port or 0) + rank}"})


def native_config(library: Any, config: MemcacheConfig) -> Any:
    local = library.LocalConfig()
    same = ("meta_service_url", "config_store_url", "protocol", "hcom_url", "world_size")
    for name in (*same, "log_level"):
        setattr(local, name, getattr(config, name))
    for name in ("dram_size", "max_dram_size", "hbm_size"):
        setattr(local, name, str(parse_bytes(getattr(config, name))))
    local.max_hbm_size = local.hbm_size
    if config.tls.enabled:
        for prefix in ("tls", "config_store_tls", "hcom_tls"):
            setattr(local, f"{prefix}_enable", True)
            for name in TlsConfig.model_fields.keys() - {"enabled"}:
                if hasattr(local, f"{prefix}_{name}"):  # hcom_tls has no package_path
                    setattr(local, f"{prefix}_{name}", getattr(config.tls, name))
    return local
