# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""What `ascend-direct doctor` looks at without a pool: software, plugin, configuration, machine.

Owns the form of a check. Whether MemCache's client can work here is store/memcache_host's to say,
whether SGLang fits is integration/seam's. Opens nothing and changes nothing.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ascend_direct.config import MIB, DirectConfig, MemcacheConfig, parse_bytes
from ascend_direct.errors import ConfigError
from ascend_direct.names import CONFIG_FLAG, FLAG
from ascend_direct.store import memcache_host
from ascend_direct.store.base import PageStore
from ascend_direct.store.choice import choose_store

Status = Literal["ok", "warning", "failure", "not checked"]

OLDEST_PYTHON = (3, 10)
PLUGIN_GROUP, PLUGIN = "sglang.srt.plugins", "ascend_direct"
ALLOW_LIST = "SGLANG_PLUGINS"
HUGE_PAGES = Path("/proc/meminfo")
# Without it MemCache's host protocols over sockets map a member's memory in huge pages
# (memcache-hybrid 1.3.0, hybm).
SMALL_PAGES_ENV = "MF_HYBM_ENABLE_4K_PAGE"
ONE_DAY_S = 86_400.0


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        found: what is there; for a failure, what is wrong and what to do.
        of_pool: the pool is to blame, not this machine.
    """

    name: str
    status: Status
    found: str
    of_pool: bool = False


def installed(distribution: str) -> str | None:
    """Its version, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def verdict(name: str, problems: list[str], fine: str, *, of_pool: bool = False) -> Check:
    """A failure with all its problems, or `fine`."""
    if problems:
        return Check(name, "failure", " ".join(problems), of_pool)
    return Check(name, "ok", fine, of_pool)


def software() -> Iterator[Check]:
    """Versions, and whether SGLang will find the plugin."""
    version, oldest = platform.python_version(), ".".join(map(str, OLDEST_PYTHON))
    old = sys.version_info[:2] < OLDEST_PYTHON
    yield verdict("python", [f"{version}: use {oldest} or newer."] if old else [], version)
    yield from _torch()
    yield _entry_point()
    yield _allow_list()


def _torch() -> Iterator[Check]:
    torch, npu = installed("torch"), installed("torch-npu")
    missing = [] if torch else ["it is not installed: use the image that SGLang runs in."]
    yield verdict("torch", missing, torch or "")
    has_npu = any(Path("/dev").glob("davinci[0-9]*"))
    if npu is None and not has_npu:
        yield Check("torch-npu", "not checked", "not installed, and this machine shows no NPU")
        return
    problems = []
    if npu is None:
        problems = [f"it is not installed, but there are NPUs: install the release for {torch}."]
    elif torch and npu.split(".")[:2] != torch.split(".")[:2]:
        problems = [f"{npu} is for another torch than {torch}: install the one of its release."]
    yield verdict("torch-npu", problems, npu or "")


def _entry_point() -> Check:
    names = {entry.name for entry in importlib.metadata.entry_points(group=PLUGIN_GROUP)}
    advice = f"SGLang does not see the plugin, {FLAG} is unknown to it: pip install --no-deps ."
    return verdict("plugin", [] if PLUGIN in names else [advice], f"in {PLUGIN_GROUP}")


def _allow_list() -> Check:
    allowed = {name.strip() for name in os.environ.get(ALLOW_LIST, "").split(",")} - {""}
    problems = []
    if allowed and PLUGIN not in allowed:
        shown = ",".join(sorted(allowed))
        problems = [f"{ALLOW_LIST}={shown} leaves the plugin out: add {PLUGIN}, or unset it."]
    return verdict("plugin allow-list", problems, "the plugin is allowed")


def sglang() -> Check:
    """Every symbol of SGLang that the plugin leans on. Imports SGLang: takes seconds."""
    from ascend_direct.integration import seam, seam_table

    try:
        problems = seam.problems()
    except Exception as error:  # noqa: BLE001  (an import of SGLang may fail in any way)
        problems = [f"SGLang cannot be imported ({type(error).__name__}: {error})."]
    version = installed("sglang")
    if problems:
        return verdict("sglang", [*problems, f"Install SGLang {seam.TESTED_SGLANG}."], "")
    if version != seam.TESTED_SGLANG:
        found = f"{version} has all that is needed, but {seam.TESTED_SGLANG} is what was tested"
        return Check("sglang", "warning", found)
    return Check("sglang", "ok", f"{version}, {len(seam_table.SEAMS)} symbols as expected")


class _Warnings(logging.Handler):
    """Collects what the package warns about while it reads a configuration."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def configuration(source: str | None) -> tuple[DirectConfig | None, Check]:
    """What the servers would read, or why they would not."""
    warnings, ours = _Warnings(), logging.getLogger("ascend_direct")
    ours.addHandler(warnings)
    try:
        config = DirectConfig.load(source)
        memcache_host.warn_about_open_secrets(config.memcache.tls)
    except ConfigError as error:
        reasons = [reason.replace(CONFIG_FLAG, "--config") for reason in error.reasons]
        return None, verdict("configuration", reasons, "")
    finally:
        ours.removeHandler(warnings)
    if warnings.lines:
        return config, Check("configuration", "warning", " ".join(warnings.lines))
    changed = config.describe()
    return config, Check("configuration", "ok", "defaults" if changed == "{}" else changed)


def store(config: DirectConfig) -> tuple[PageStore | None, list[Check]]:
    """The chosen store, not opened, and whether it could work on this machine."""
    try:
        chosen = choose_store(config)
    except ConfigError as error:
        return None, [verdict("store", list(error.reasons), "")]
    if chosen.name != "memcache":
        return chosen, [verdict("store", chosen.problems(), chosen.name)]
    named = memcache_host.problems_by_name(config.memcache)
    checks = [Check("store", "ok", "memcache")]
    fine = {"memcache": installed(memcache_host.DISTRIBUTION) or "", "hardware": "fits"}
    checks += [verdict(name, why, fine.get(name, "fine")) for name, why in named.items()]
    return chosen, checks


def machine(config: MemcacheConfig) -> Iterator[Check]:
    """Addresses, limits and the clock, as far as the protocol needs them."""
    if config.protocol in ("host_tcp", "host_rdma"):
        problem = memcache_host.own_address_problem(config.hcom_url)
        yield verdict("own address", [problem] if problem else [], config.hcom_url)
        yield _huge_pages(config)
    if config.protocol.endswith("_rdma"):
        yield _locked_memory()
    yield _clock()


def _huge_pages(config: MemcacheConfig) -> Check:
    wanted = parse_bytes(config.dram_size)
    if not wanted or os.environ.get(SMALL_PAGES_ENV) == "1":
        return Check("huge pages", "ok", "not needed")
    fields = dict(line.split(":", 1) for line in HUGE_PAGES.read_text().splitlines())
    free = int(fields["HugePages_Free"]) * int(fields["Hugepagesize"].split()[0]) << 10
    advice = (
        f"memcache.dram_size is {wanted // MIB} MiB and {free // MIB} MiB of huge pages are free: "
        f"raise vm.nr_hugepages, or set {SMALL_PAGES_ENV}=1."
    )
    return verdict("huge pages", [advice] if free < wanted else [], f"{free // MIB} MiB free")


def _locked_memory() -> Check:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return Check("locked memory", "ok", "unlimited")
    found = f"limited to {soft >> 10} KiB, and RDMA locks what it registers: ulimit -l unlimited."
    return Check("locked memory", "warning", found)


def _clock() -> Check:
    newest_s = Path(__file__).stat().st_mtime
    behind_s = newest_s - time.time()
    advice = "it is before this package was installed: set it (certificates depend on it)."
    return verdict("clock", [advice] if behind_s > ONE_DAY_S else [], "plausible")
