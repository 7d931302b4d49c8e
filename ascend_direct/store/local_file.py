# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Opening the local store's LMDB environment, or saying why this machine cannot.

Owns the directory, its permissions, the space check, and leftovers of an earlier boot or setting.
Does not own what is stored in it (local).
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import lmdb

from ascend_direct.config import MIB, LocalConfig
from ascend_direct.errors import ConfigError

_FORMAT = 2
_FILES = ("data.mdb", "lock.mdb")
_LOCK_WAIT_S = 3.0
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def open_environment(
    path: Path, config: LocalConfig, tables: Sequence[bytes]
) -> tuple[Any, list[Any]]:
    """The LMDB environment in `path`, at most `config.size_bytes` large, and its tables.

    Raises:
        ConfigError: the path cannot be used, and what to do about it.
    """
    try:
        _make_directory(path)
        with _alone_in(path, config.sync):
            _require_space(path, config.size_bytes)
            env = lmdb.open(
                str(path),
                map_size=config.size_bytes // 4096 * 4096,
                max_dbs=len(tables),
                max_readers=1024,
                mode=0o600,
                sync=config.sync,
                metasync=config.sync,
            )
            try:
                env.reader_check()
                _require_same(env, path, config.size_bytes)
                return env, [env.open_db(name) for name in tables]
            except (lmdb.Error, ConfigError):
                env.close()
                raise
    except OSError as error:
        raise ConfigError(
            [f"local.path {path}: {error.strerror}; name a directory you can write."]
        ) from error
    except lmdb.Error as error:
        hint = "if it is damaged or another program's, delete it"
        if "already open" in str(error):
            hint = "LMDB allows one store per path and process: share the first"
        raise ConfigError([f"local.path {path}: {error}; {hint}."]) from error


def _make_directory(path: Path) -> None:
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.stat()
    if found.st_uid != os.geteuid() or found.st_mode & 0o022:
        reason = "belongs to, or is writable by, others, who could read or forge pages"
        raise ConfigError([f"local.path {path} {reason}; name a new directory inside it."])


@contextmanager
def _alone_in(path: Path, sync: bool) -> Iterator[None]:
    """One process at a time. Unsynced pages of an earlier boot may be torn: forget them."""
    boot_id = _BOOT_ID.read_text()
    with open(os.open(path / "boot_id", os.O_RDWR | os.O_CREAT, 0o600), "r+") as marker:
        _lock(marker, path)
        if marker.read() not in ("", boot_id):
            for name in _FILES:
                (path / name).unlink(missing_ok=True)
            marker.truncate(0)
        if not sync:
            marker.seek(0)
            marker.write(boot_id)
            marker.flush()
            os.fsync(marker)
        yield


def _lock(marker: IO[str], path: Path) -> None:
    """Wait for the other openers: each takes milliseconds, unless it was stopped meanwhile."""
    deadline = time.monotonic() + _LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                reason = f"is still being opened by another process after {_LOCK_WAIT_S:.0f} s"
                raise ConfigError([f"local.path {path} {reason}; end it or use another."]) from None
        time.sleep(0.02)


def _require_space(path: Path, size_bytes: int) -> None:
    data, system = path / _FILES[0], os.statvfs(path)
    held_bytes = data.stat().st_blocks * 512 if data.exists() else 0
    room_bytes = system.f_bavail * system.f_frsize + held_bytes
    if system.f_blocks and room_bytes < size_bytes:  # 0 blocks: a tmpfs without a bound
        problem = f"{size_bytes // MIB} MiB, but {path} has room for {room_bytes // MIB} MiB"
        advice = "make it smaller, free space, or choose another local.path"
        raise ConfigError([f"local.size_bytes is {problem}; {advice}."])


def _require_same(env: Any, path: Path, size_bytes: int) -> None:
    """Refuse a file cut short, before reading it is a SIGBUS; and one of another format or size."""
    used_bytes = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
    if (path / _FILES[0]).stat().st_size < used_bytes:
        raise ConfigError([f"local.path {path} is cut short; stop its servers and delete it."])
    wanted = b"format %d, size_bytes %d" % (_FORMAT, size_bytes)
    with env.begin(write=True) as txn:
        txn.put(b"format", wanted, overwrite=False)
        found: bytes = txn.get(b"format")
    if found != wanted:
        advice = "use one size for all servers of the host, or stop them and delete it"
        raise ConfigError([f"local.path {path} has {found!r}, not {wanted!r}; {advice}."])
