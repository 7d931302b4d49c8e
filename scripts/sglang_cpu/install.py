# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Makes the virtual environment in which SGLang 0.5.23 runs on a CPU, with this project in it.

Owns the order of the steps, their resumption and the stamp that makes a second run instant. What is
installed is decided by the two lock files, stand_ins/ and *_on_cpu/. Standard library only: it
runs before anything is installed. An interrupted run leaves no stamp; the next one goes on.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import fcntl
import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

HERE = Path(__file__).resolve().parent
if str(HERE.parent) not in sys.path:  # run as a file
    sys.path.insert(0, str(HERE.parent))
from sglang_cpu.pip_runner import InstallError, Runner  # noqa: E402

REPOSITORY = HERE.parent.parent
LOCK = HERE / "requirements.lock"
# For the tests of the packing kernel, which run beside it: site-packages has a stand-in for Triton.
TRITON_LOCK = HERE / "triton_ascend.lock"
TRITON_FOLDER = "triton_ascend"  # in the environment
LOCAL_PACKAGES = (
    *(HERE / "stand_ins" / name for name in ("triton", "torchvision", "sgl_kernel")),
    HERE / "attention_on_cpu",
    HERE / "mla_on_cpu",
    HERE / "pd_on_cpu",
)
# Mooncake, which moves KV between prefill and decode nodes, is linked against the first; Debian's
# and Ubuntu's names.
RDMA_LIBRARY = "libibverbs.so.1"
RDMA_PACKAGES = ("libibverbs1", "libnl-3-200", "libnl-route-3-200")
PYTHON = (3, 11)
RECIPE_VERSION = "1"  # raise it when the steps change so that an old environment must be redone
NEEDED_DISK_BYTES = 3 * 10**9

_IMPORT_CHECK = """
import importlib.metadata as metadata
import sgl_kernel, sglang, torch, torchvision, triton
assert torch.__version__.split("+")[0] == "{torch}", "torch was replaced: " + torch.__version__
assert metadata.version("sglang") == "{sglang}", "sglang is " + metadata.version("sglang")
"""


_TRITON_CHECK = """
import sys
sys.path.insert(0, {folder!r})
import triton.backends.ascend.compiler, triton.runtime.interpreter
assert triton.__version__ == "{version}", "this is triton " + triton.__version__
"""


class Step(NamedTuple):
    title: str
    run: Callable[[], None]


def pins(lock: Path = LOCK) -> dict[str, str]:
    lines = (line.split("#")[0].strip() for line in lock.read_text().splitlines())
    return dict(line.split("==", 1) for line in lines if line)


def digest(paths: Sequence[Path], *words: str) -> str:
    """Of the words, and of every file at or under the paths (not what a build left there)."""
    state = hashlib.sha256("\0".join(words).encode())
    for root in paths:
        files = sorted(root.rglob("*")) if root.is_dir() else [root]
        for file in files:
            if file.suffix in {".py", ".toml", ".lock", ".c", ".cpp", ".h", ".txt"}:
                name = str(file.relative_to(root))
                content = file.read_bytes() if file.is_file() else b""
                state.update(f"\0{root.name}/{name}\0{len(content)}\0".encode() + content)
    return state.hexdigest()


class Environment:
    """One virtual environment: where things are in it, and what its stamp says."""

    def __init__(self, venv: Path) -> None:
        self.venv = venv
        self.python = venv / "bin" / "python"
        self.site_packages = venv / "lib" / f"python{PYTHON[0]}.{PYTHON[1]}" / "site-packages"
        self.log = venv / "install.log"
        self._stamp = venv / "installed.json"
        version = ".".join(map(str, sys.version_info[:3]))
        project = [REPOSITORY / name for name in ("pyproject.toml", "setup.py", "kernels")]
        self.wanted = {
            "environment": digest([LOCK, *LOCAL_PACKAGES], RECIPE_VERSION, version, str(venv)),
            "project": digest(project, RECIPE_VERSION, str(REPOSITORY)),
            "triton": digest([TRITON_LOCK], RECIPE_VERSION, version, str(venv)),
        }

    def missing_parts(self) -> list[str]:
        """The parts that are not installed as wanted, in the order to install them."""
        stamp = self._stamped()
        if not self.python.exists() or stamp.get("environment") != self.wanted["environment"]:
            return list(self.wanted)
        return [part for part, wanted in self.wanted.items() if stamp.get(part) != wanted]

    def _stamped(self) -> dict[str, str]:
        try:
            stamp: dict[str, str] = json.loads(self._stamp.read_text())
        except (OSError, ValueError):
            return {}
        return stamp

    def write_stamp(self, part: str) -> None:
        """Note that a part is installed as wanted."""
        partial = self._stamp.with_suffix(".partial")
        stamp = {**self._stamped(), part: self.wanted[part]}
        partial.write_text(json.dumps(stamp, indent=1) + "\n")
        partial.replace(self._stamp)

    def remove_stamp(self) -> None:
        self._stamp.unlink(missing_ok=True)

    def forget_broken_packages(self) -> None:
        """Make pip reinstall what an interrupted run left half-written.

        pip takes a package for installed as soon as its metadata folder is there.
        """
        for leftover in self.site_packages.glob("~*"):
            shutil.rmtree(leftover, ignore_errors=True)
        for metadata in self.site_packages.glob("*.dist-info"):
            if not self._is_complete(metadata):
                shutil.rmtree(metadata)

    def _is_complete(self, metadata: Path) -> bool:
        try:
            with (metadata / "RECORD").open(newline="") as record:
                rows = [row for row in csv.reader(record) if len(row) == 3]
        except OSError:
            return False
        return all(self._is_whole(name, size) for name, _, size in rows)

    def _is_whole(self, name: str, size: str) -> bool:
        if name.endswith(".pyc"):
            return True
        try:
            found = (self.site_packages / name).stat().st_size
        except OSError:
            return False
        return not size or found == int(size)


class Installer:
    """The steps, in order; each may be repeated."""

    def __init__(self, environment: Environment, *, verbose: bool) -> None:
        self._env = environment
        self._run = Runner(environment.log, verbose=verbose)
        self._pins = pins()

    def steps(self, parts: Sequence[str]) -> list[Step]:
        steps: list[Step] = []
        if "environment" in parts:
            steps += [
                Step("virtual environment", self._make_venv),
                Step(f"torch {self._pins['torch']}", self._install_torch),
                Step("stand-ins for triton, torchvision, sgl_kernel", self._install_local),
                Step(f"{len(self._pins)} pinned packages", self._install_lock),
                Step("system libraries of mooncake", self._install_rdma),
                Step("bytecode", self._compile),
                Step("check", self._check),
            ]
        if "project" in parts:
            steps.append(Step("this project", self._install_project))
        if "triton" in parts:
            steps.append(Step("triton-ascend, for tests of the kernel", self._install_triton))
        return steps

    def _pip(self, *arguments: str) -> None:
        self._run([str(self._env.python), "-m", "pip", "install", "--no-compile", *arguments])

    def _make_venv(self) -> None:
        self._env.forget_broken_packages()
        self._run([sys.executable, "-m", "venv", str(self._env.venv)])
        self._pip(f"setuptools=={self._pins['setuptools']}")

    def _install_torch(self) -> None:
        # With its dependencies: a CUDA build, where no CPU build is found, loads only with them.
        self._pip(f"torch=={self._pins['torch']}", "-c", str(LOCK))

    def _install_local(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            # Built from a copy: setuptools leaves its build files beside the source.
            copies = [str(shutil.copytree(p, Path(folder) / p.name)) for p in LOCAL_PACKAGES]
            self._pip("--no-deps", "--no-build-isolation", "--force-reinstall", *copies)

    def _install_lock(self) -> None:
        self._pip("--no-deps", "-r", str(LOCK))

    def _install_rdma(self) -> None:
        """Without them all else works; what needs prefill and decode nodes says what is missing."""
        if _loads(RDMA_LIBRARY):
            return
        if os.geteuid() == 0 and shutil.which("apt-get"):
            self._run(["apt-get", "update"], may_fail=True)
            self._run(["apt-get", "install", "-y", *RDMA_PACKAGES], may_fail=True)
        if not _loads(RDMA_LIBRARY):
            print(f"      no {RDMA_LIBRARY}: for prefill and decode nodes, as root: ", end="")
            print("apt-get install " + " ".join(RDMA_PACKAGES), flush=True)

    def _compile(self) -> None:
        # Once and for all: where PYTHONDONTWRITEBYTECODE is set, every server start would pay.
        # Some packages carry templates that are not Python, hence may_fail.
        command = [str(self._env.python), "-m", "compileall", "-qq", "-j", "0"]
        self._run([*command, str(self._env.site_packages)], may_fail=True)

    def _check(self) -> None:
        code = _IMPORT_CHECK.format(torch=self._pins["torch"], sglang=self._pins["sglang"])
        self._run([str(self._env.python), "-c", code])
        self._env.write_stamp("environment")

    def _install_project(self) -> None:
        if not (REPOSITORY / "pyproject.toml").is_file():
            raise InstallError(
                f"{REPOSITORY} has no pyproject.toml, so the project itself cannot be installed; "
                "the rest of the environment is complete.\nWhat to do: use a whole clone"
            )
        self._pip("--no-deps", "--no-build-isolation", "-e", str(REPOSITORY))
        self._env.write_stamp("project")

    def _install_triton(self) -> None:
        """Without it all else works; its tests say that it is missing, and the next run tries."""
        folder = self._env.venv / TRITON_FOLDER
        shutil.rmtree(folder, ignore_errors=True)
        code = _TRITON_CHECK.format(folder=str(folder), version=pins(TRITON_LOCK)["triton-ascend"])
        try:
            # Retries: where there is no network, each run would wait for all of them.
            options = ("--no-deps", "--retries", "1", "--target", str(folder))
            self._pip(*options, "-r", str(TRITON_LOCK))
            self._run([str(self._env.python), "-c", code])
        except InstallError as error:
            shutil.rmtree(folder, ignore_errors=True)
            print(f"      left out: {error}", flush=True)
        else:
            self._env.write_stamp("triton")


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def check_machine(venv: Path) -> None:
    wanted = ".".join(map(str, PYTHON))
    if sys.version_info[:2] != PYTHON:
        found = shutil.which(f"python{wanted}")
        advice = f"run `{found} {sys.argv[0]}`" if found else f"install Python {wanted} with venv"
        raise InstallError(f"this is Python {sys.version.split()[0]}, {wanted} is needed: {advice}")
    strangers = {p.name for p in venv.iterdir()} - {"install.lock"} if venv.exists() else set()
    if strangers and not (venv / "pyvenv.cfg").exists():
        raise InstallError(f"{venv} exists and is no virtual environment: choose another --venv")
    home = venv / "lib" / f"python{wanted}"
    if (venv / "lib").exists() and not home.exists():
        raise InstallError(f"{venv} was made by another Python: remove it, then run this again")
    folder = next(p for p in (venv, *venv.parents) if p.exists())
    free_bytes = shutil.disk_usage(folder).free
    if not (home / "site-packages" / "sglang").exists() and free_bytes < NEEDED_DISK_BYTES:
        raise InstallError(
            f"{free_bytes / 1e9:.1f} GB are free at {folder}, "
            f"{NEEDED_DISK_BYTES / 1e9:.0f} GB are needed: free some, or use --venv elsewhere"
        )


@contextmanager
def only_one_installer(venv: Path) -> Iterator[None]:
    venv.mkdir(parents=True, exist_ok=True)
    with (venv / "install.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another installer works on {venv}: waiting for it", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def install(venv: Path, *, verbose: bool = False) -> None:
    """Bring the environment at `venv` up to date; returns at once when it is.

    Raises:
        InstallError: with the reason and the way out.
    """
    environment = Environment(venv)
    if not environment.missing_parts():
        print(f"{venv} is up to date")
        return
    check_machine(venv)
    with only_one_installer(venv):
        parts = environment.missing_parts()  # another installer may have done it meanwhile
        if "environment" in parts:
            environment.remove_stamp()
        started = time.monotonic()
        steps = Installer(environment, verbose=verbose).steps(parts) if parts else []
        for number, step in enumerate(steps, 1):
            elapsed = time.monotonic() - started
            print(f"[{number}/{len(steps)}] {elapsed:4.0f} s  {step.title}", flush=True)
            step.run()
        print(f"done in {time.monotonic() - started:.0f} s: {venv}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="install.py",
        description="Install SGLang 0.5.23 for the CPU, this project, and its development tools.",
        epilog="Takes about 3 minutes and 2 GB the first time, less than a second when nothing "
        "has changed. Interrupt it at will: the next run goes on. pip's own configuration and "
        "PIP_* variables apply (index, proxy, certificates, timeouts).",
    )
    where = REPOSITORY / ".venv"
    parser.add_argument("--venv", type=Path, default=where, help="where to (default: ./.venv)")
    parser.add_argument("--verbose", action="store_true", help="show pip's output as it comes")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        install(Path(os.path.abspath(options.venv)), verbose=options.verbose)
    except InstallError as error:
        print(f"install.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninstall.py: interrupted; run it again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
