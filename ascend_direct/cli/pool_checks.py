# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""What `ascend-direct doctor` looks at in a pool: does it listen, has it memory, is a page kept.

Owns the checks and the deadline of the round trip, which runs in a process of its own: joining a
pool is a native call that cannot be interrupted. Asking MetaService is store/meta_service's.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from ascend_direct.cli.checks import Check, verdict
from ascend_direct.config import MIB, DirectConfig, MemcacheConfig
from ascend_direct.errors import StoreUnavailable
from ascend_direct.store.base import PageStore
from ascend_direct.store.meta_service import MetaServiceHttp, require_listening

# SoC names as aclrtGetSocName gives them; which data path MemCache has for each (its README).
CHIPS = {"Ascend910_93": ("A3", "device_sdma"), "Ascend910B": ("A2", "device_rdma")}


def services(config: MemcacheConfig) -> Iterator[Check]:
    """MetaService's ports, its HTTP side, and the members."""
    for name, option in (("MetaService", "meta_service_url"), ("config store", "config_store_url")):
        url, problems = getattr(config, option), []
        try:
            require_listening(option, url)
        except StoreUnavailable as error:
            problems = [f"{error}."]
        yield verdict(name, problems, f"listens at {url}", of_pool=True)
    if not config.metrics_url:
        yield Check("members", "not checked", "set memcache.metrics_url to see the pool's members")
        return
    http = MetaServiceHttp(config.metrics_url)
    try:
        yield _members(config, http)
    finally:
        http.close()


def _members(config: MemcacheConfig, http: MetaServiceHttp) -> Check:
    links, usage = http.links(), http.usage()
    if links is None or usage is None:
        advice = f"{config.metrics_url} does not answer as a MetaService: correct metrics_url."
        return Check("members", "failure", advice, of_pool=True)
    if links.world_size not in (None, config.world_size):
        advice = f"world_size is {config.world_size}, the pool's {links.world_size}: use that."
        return Check("members", "failure", advice)
    if not usage.capacity_bytes:
        advice = "nobody gives memory: start `ascend-direct pool member --dram-size …` on a host."
        return Check("members", "failure", advice, of_pool=True)
    found = f"{links.members} in the pool, {usage.used_bytes // MIB} of "
    found += f"{usage.capacity_bytes // MIB} MiB used"
    if not links.complete:
        found += f"; only {links.connected} of {links.expected} links are up: wait, or look for a "
        found += "firewall between them"
        return Check("members", "warning", found, of_pool=True)
    return Check("members", "ok", found, of_pool=True)


def round_trip(source: str | None, timeout_s: float) -> tuple[str | None, Check]:
    """The chip's name, where there is one, and whether a page comes back as it was put."""
    command = [sys.executable, "-m", "ascend_direct.cli.round_trip"]
    try:
        done = subprocess.run(
            command,
            input=json.dumps(source),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        output, ended = done.stdout, f"ended with code {done.returncode}"
        detail = done.stderr
    except subprocess.TimeoutExpired as error:
        output, ended, detail = _text(error.stdout), f"has not ended in {timeout_s:.0f} s", ""
    told: dict[str, Any] = {}
    for line in output.splitlines():
        told |= json.loads(line)
    chip = told.get("chip")
    if told.get("ok"):
        text = f"{told['bytes']} bytes put in {told['put_ms']} ms, read in {told['get_ms']} ms"
        return chip, Check("round trip", "ok", text, of_pool=True)
    last = (detail.strip().splitlines() or [""])[-1][:200]
    why = told.get("problem") or f"the trial {ended}: the pool hangs, or its client does. {last}"
    return chip, Check("round trip", "failure", why.strip(), of_pool=True)


def _text(output: bytes | str | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def protocol(config: MemcacheConfig, chip: str | None) -> Check:
    """Whether MemCache's device data path is the one of this chip."""
    if not config.protocol.startswith("device_"):
        return Check("protocol", "ok", f"{config.protocol} works with any hardware")
    for start, (series, right) in CHIPS.items():
        if (chip or "").startswith(start):
            advice = f"this is an {series} ({chip}), {config.protocol} is not for it: use {right}."
            fits = [] if config.protocol == right else [advice]
            return verdict("protocol", fits, f"{config.protocol} is for {series} ({chip})")
    return Check("protocol", "not checked", f"the chip ({chip or 'no answer'}) is not known here")


def pool(config: DirectConfig, chosen: PageStore) -> Iterator[Check]:
    """Whether the chosen store's pool is there."""
    if chosen.name == "memcache":
        yield from services(config.memcache)
        return
    away = chosen.unreachable()
    yield verdict("pool", [away] if away else [], "it is there", of_pool=True)
