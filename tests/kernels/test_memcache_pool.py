# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""A MetaService of our own starts, says why when it cannot, and never stays behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tests.kernels.pool_member  # noqa: F401  (puts scripts/ on the path)

import ascend_emulation  # isort: skip
import memcache_pool  # isort: skip

pytestmark = [
    pytest.mark.memcache,
    pytest.mark.multi,
    pytest.mark.skipif(
        ascend_emulation.real_driver_present() is not None,
        reason="the emulation refuses to start where an Ascend driver is present",
    ),
]


def test_stopping_ends_the_service_in_bounded_time_and_leaves_nothing() -> None:
    meta = memcache_pool.MetaServiceProcess(stop_grace_s=6.0).start()
    pid, run_dir = meta.pid, meta.run_dir
    assert pid is not None
    started_s = time.monotonic()
    meta.stop()
    meta.stop()
    assert time.monotonic() - started_s < 7.0
    assert not run_dir.exists()
    assert not Path(f"/proc/{pid}").exists()
    with pytest.raises(memcache_pool.PoolError, match="start it first"):
        meta.keys()


def test_a_service_ends_with_the_process_that_started_it() -> None:
    program = (
        f"import sys, time; sys.path.insert(0, {str(Path(memcache_pool.__file__).parent)!r})\n"
        "import memcache_pool\n"
        "meta = memcache_pool.MetaServiceProcess().start()\n"
        "print(meta.pid, meta.run_dir, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid, run_dir = parent.stdout.readline().decode().split()
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}/cmdline").exists() and time.monotonic() < deadline:
        if not Path(f"/proc/{pid}/cmdline").read_bytes():
            break  # a zombie: ended, but not yet collected by its new parent
        time.sleep(0.1)
    assert time.monotonic() < deadline
    for path in sorted(Path(run_dir).rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    Path(run_dir).rmdir()


def test_a_second_service_in_a_run_directory_says_what_is_wrong() -> None:
    with (
        memcache_pool.MetaServiceProcess(stop_grace_s=0.2) as first,
        pytest.raises(memcache_pool.PoolError, match="already running"),
    ):
        memcache_pool.MetaServiceProcess(run_dir=first.run_dir).start()


def test_a_service_that_cannot_start_shows_its_log(tmp_path: Path) -> None:
    (tmp_path / "memcache_hybrid.py").write_text("raise ImportError('broken on purpose')\n")
    meta = memcache_pool.MetaServiceProcess(environment={"PYTHONPATH": str(tmp_path)})
    with pytest.raises(memcache_pool.PoolError, match="broken on purpose"):
        meta.start()


def test_waiting_for_members_that_never_come_ends_with_advice() -> None:
    with (
        memcache_pool.MetaServiceProcess(stop_grace_s=0.2) as meta,
        pytest.raises(memcache_pool.PoolError, match=r"3 members were not linked within 0\.2 s"),
    ):
        meta.wait_linked(3, timeout_s=0.2)
