# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Run unmodified ``memcache_hybrid`` programs on a machine without an NPU.

Owns how a process gets onto kernels/ascend_emulation: building it, the environment it needs, and
the refusal where a real Ascend driver is present. It starts no MemCache service and no pool member
(memcache_pool.py does). Standard library only, so that any interpreter can run it:

    python scripts/ascend_emulation.py env --protocol host_tcp   # prints export lines
    python scripts/ascend_emulation.py run -- python my_program.py

What it runs on is never an NPU, and what it shows is at most rung E2 of the evidence ladder.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "kernels" / "ascend_emulation"
DEFAULT_TREE = ROOT / "build" / "ascend_emulation"

PROTOCOLS = ("host_shm", "host_tcp", "device_sdma")
PATH_SHIM = "libascend_paths.so"

_DRIVER_TRACES = ("dev/davinci*", "usr/local/Ascend/driver/version.info", "etc/ascend_install.info")
_TMPFS = Path("/dev/shm")
_EX_CONFIG = 78


class EmulationError(RuntimeError):
    """The emulation cannot be built or used here. The message ends with what to do."""


def real_driver_present() -> str | None:
    """The path that shows an Ascend driver on this machine, or None.

    ``ASCEND_EMULATION_DRIVER_ROOT`` adds a second root to look under. It is there for tests: it can
    invent a driver, never hide one. guard.c decides the same, in every process, by the same rule.
    """
    roots = [Path("/")]
    if extra_root := os.environ.get("ASCEND_EMULATION_DRIVER_ROOT"):
        roots.append(Path(extra_root))
    for root in roots:
        for trace in _DRIVER_TRACES:
            for found in sorted(root.glob(trace)):
                return str(found)
    return None


def _require_no_driver() -> None:
    if found := real_driver_present():
        raise EmulationError(
            f"this machine has an Ascend driver ({found}): run without the emulation"
        )


def build(out: Path = DEFAULT_TREE) -> Path:
    """Build the emulation into ``out``, or do nothing when it is up to date. Returns ``out``."""
    _require_no_driver()
    out = out.resolve()
    if any(mark in str(out) for mark in " :\t\n"):
        raise EmulationError(
            f"LD_PRELOAD ends a name at a blank or colon, so {out} cannot be used: choose another"
        )
    done = subprocess.run(
        ["sh", str(SOURCES / "build.sh"), str(out)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise EmulationError(f"building the emulation in {out} failed:\n{done.stderr.strip()}")
    return out


def private_run_dir() -> Path:
    """A new directory on a tmpfs for the processes of one pool. Who asks for it removes it."""
    parent = _TMPFS if os.access(_TMPFS, os.W_OK | os.X_OK) else None
    return Path(tempfile.mkdtemp(prefix="ascend-emulation-", dir=parent))


def environment(
    tree: Path,
    run_dir: Path,
    *,
    protocol: str,
    site_packages: Path | None = None,
) -> dict[str, str]:
    """The variables that a member of a pool, or its MetaService, needs on top of its own.

    They must be set before the process starts. The members of one pool share ``run_dir``; two pools
    on one machine must not.

    Under host_shm and host_tcp the SoC poses as an Ascend910B3: CPU tensors are host memory (H2G,
    G2H). Under device_sdma it poses as an A3, whose driver is asked what an address is, and answers
    "device memory" for every one: CPU tensors take the path of NPU tensors (L2G, G2L).
    """
    _require_no_driver()
    if protocol not in PROTOCOLS:
        raise EmulationError(f"{protocol!r} is not emulated: choose one of {', '.join(PROTOCOLS)}")
    tree = tree.resolve()
    libraries = [str(tree / "lib64")]
    variables = {
        "ASCEND_EMULATION": "1",
        "ASCEND_EMULATION_RUN_DIR": str(run_dir.resolve()),
        "ASCEND_EMULATION_INSTALL_INFO": str(tree / "ascend_install.info"),
        "ASCEND_EMULATION_SOC": "Ascend910B3",
        "ASCEND_EMULATION_ALL_DEVICE": "0",
        "ASCEND_HOME_PATH": str(tree),
        "LD_PRELOAD": _prepend("LD_PRELOAD", [str(tree / "lib64" / PATH_SHIM)]),
    }
    if protocol == "host_tcp":
        site = site_packages or Path(sysconfig.get_paths()["purelib"])
        libraries.append(str(site / "memfabric_hybrid" / "lib"))  # what its libhcom.so links to
        variables["MF_HYBM_ENABLE_4K_PAGE"] = "1"  # there are no huge pages
        variables["MF_HCOM_MAX_SEND_RECV_DATA_CNT"] = "64"  # else 8 GiB of buffers per member
    if protocol == "device_sdma":
        variables["ASCEND_EMULATION_SOC"] = "Ascend910_9382"
        variables["ASCEND_EMULATION_ALL_DEVICE"] = "1"
    variables["LD_LIBRARY_PATH"] = _prepend("LD_LIBRARY_PATH", libraries)
    return variables


def _prepend(variable: str, ours: Sequence[str]) -> str:
    """Our entries, then those that this process was started with; no entry twice."""
    theirs = [entry for entry in os.environ.get(variable, "").split(":") if entry]
    return ":".join(dict.fromkeys([*ours, *theirs]))


def _run(command: Sequence[str], variables: dict[str, str]) -> int:
    """Run a command to its end and pass on the signals meant for it. Returns its exit status."""
    child = subprocess.Popen(command, env={**os.environ, **variables})

    def forward(number: int, _frame: FrameType | None) -> None:
        child.send_signal(number)

    handlers: dict[int, Callable[[int, FrameType | None], object] | int | None] = {
        number: signal.signal(number, forward)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        status = child.wait()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return 128 - status if status < 0 else status


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("action", choices=("env", "run"), help="print the variables, or use them")
    parser.add_argument("--protocol", choices=PROTOCOLS, default="host_shm")
    parser.add_argument("--tree", type=Path, default=DEFAULT_TREE, help="where it is built")
    parser.add_argument("--run-dir", type=Path, help="shared by one pool; default: a new one")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="for run, after --")
    options = parser.parse_args(arguments)
    options.command = options.command[options.command[:1] == ["--"] :]
    if (options.action == "run") != bool(options.command):
        parser.error("run needs a command after --, and env takes none")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    try:
        tree = build(options.tree)
        run_dir = options.run_dir or private_run_dir()
        variables = environment(tree, run_dir, protocol=options.protocol)
    except EmulationError as error:
        print(f"ascend_emulation: {error}", file=sys.stderr)
        return _EX_CONFIG
    if options.action == "env":
        for name, value in variables.items():
            print(f"export {name}={shlex.quote(value)}")
        return 0
    try:
        return _run(options.command, variables)
    finally:
        if options.run_dir is None:
            shutil.rmtree(run_dir, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
