# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""`ascend-direct pool`: processes that are the pool, as opposed to servers that use it.

Owns the life of a member process: options, its output, signals, exit code. Joining and leaving are
store/memcache's.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
from types import FrameType
from typing import Annotated, Any, NoReturn, TextIO

import typer
from rich.console import Console

from ascend_direct.cli.conventions import EXIT_OK, complain, end, option, take_stdout
from ascend_direct.config import MIB, DirectConfig, MemcacheConfig, parse_bytes
from ascend_direct.errors import ConfigError, StoreUnavailable
from ascend_direct.store.base import StoreContext
from ascend_direct.store.memcache import MemcacheStore

app = typer.Typer(help="Run and look after a MemCache pool.", no_args_is_help=True)


Text = str | None
Config = Annotated[
    Text, option("--config", "JSON or @file, as the servers have it; section memcache is used.")
]
DramSize = Annotated[Text, option("--dram-size", "DRAM to give, such as 64GB.")]
MaxDramSize = Annotated[
    Text, option("--max-dram-size", "Largest --dram-size; the same on all members.")
]
MetaUrl = Annotated[Text, option("--meta-service-url", "MetaService, as tcp://10.0.0.1:5000.")]
StoreUrl = Annotated[Text, option("--config-store-url", "Its config store, tcp://10.0.0.1:6000.")]
MetricsUrl = Annotated[
    Text, option("--metrics-url", "Its HTTP address; without it links are not waited for.")
]
Protocol = Annotated[Text, option("--protocol", "Data path, the same as on the servers.")]
HcomUrl = Annotated[
    Text, option("--hcom-url", "This process's own address under host_tcp and host_rdma.")
]
WorldSize = Annotated[int | None, option("--world-size", "Most members; the same on all of them.")]
DeviceId = Annotated[int, typer.Option(help="NPU to use under a device_* protocol.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object per event.")]


@app.command()
def member(
    dram_size: DramSize = None,
    config: Config = None,
    meta_service_url: MetaUrl = None,
    config_store_url: StoreUrl = None,
    metrics_url: MetricsUrl = None,
    protocol: Protocol = None,
    hcom_url: HcomUrl = None,
    max_dram_size: MaxDramSize = None,
    world_size: WorldSize = None,
    device_id: DeviceId = 0,
    as_json: AsJson = False,
) -> None:
    """Give DRAM to the pool until SIGTERM or Ctrl-C, without serving a model.

    In MemCache a page lives in the memory of one member and goes when that process goes. Pages that
    must outlive a server belong on a member like this one, beside servers with dram_size 0.

    Prints one line when it has joined and, given --metrics-url, is linked with every other member.
    An option wins over ASCEND_DIRECT_MEMCACHE__… variables, which win over --config.

    Exit codes: 0 ended by a signal; 2 bad configuration, or this machine cannot; 3 the pool is not
    available. While it leaves the pool, for some seconds, a second signal ends it at once.
    """
    given = {
        "dram_size": dram_size,
        "meta_service_url": meta_service_url,
        "config_store_url": config_store_url,
        "metrics_url": metrics_url,
        "protocol": protocol,
        "hcom_url": hcom_url,
        "max_dram_size": max_dram_size,
        "world_size": world_size,
    }
    try:
        settings = _settings(config, {name: v for name, v in given.items() if v is not None})
    except ConfigError as error:
        raise typer.Exit(complain(error)) from None
    _Member(settings, device_id, as_json, take_stdout()).run()


def _settings(source: str | None, flags: dict[str, Any]) -> MemcacheConfig:
    base = DirectConfig.load(source).memcache
    merged = {**base.model_dump(exclude_unset=True), **flags}
    settings = DirectConfig.load({"memcache": merged}, environ={}).memcache
    if parse_bytes(settings.dram_size) == 0:
        raise ConfigError(["a member without memory holds no pages: give --dram-size."])
    return settings


class _Member:
    """One member from joining to leaving; the process belongs to it."""

    def __init__(
        self, settings: MemcacheConfig, device_id: int, as_json: bool, out: TextIO
    ) -> None:
        self._settings = settings
        self._device_id = device_id
        self._as_json = as_json
        self._store = MemcacheStore(settings)
        self._has_joined = False
        self._stop = threading.Event()
        self._out = out

    def run(self) -> NoReturn:
        """Join, wait for a signal, leave, end the process."""
        logging.basicConfig(level=logging.INFO, format="ascend-direct: %(message)s")
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        try:
            self._store.open(StoreContext(device_id=self._device_id))
        except (ConfigError, StoreUnavailable) as error:
            end(complain(error))
        self._has_joined = True
        self._say_joined()
        self._stop.wait()
        self._store.close()
        self._say({"event": "left"}, "left the pool; the pages it held are gone")
        end(EXIT_OK)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        if self._stop.is_set() or not self._has_joined:
            end(EXIT_OK)  # a second signal; or it holds no page yet, so nothing needs order
        self._stop.set()

    def _say_joined(self) -> None:
        stats = self._store.stats()
        event = {
            "event": "joined",
            "pid": os.getpid(),
            "member_id": self._store.member_id,
            "dram_bytes": parse_bytes(self._settings.dram_size),
            "pool_bytes": stats.capacity_bytes,
            "meta_service_url": self._settings.meta_service_url,
        }
        pool = "" if stats.capacity_bytes is None else f" of {stats.capacity_bytes // MIB} MiB"
        self._say(
            event,
            f"[green]joined[/green] {self._settings.meta_service_url} as member "
            f"{event['member_id']}, giving {parse_bytes(self._settings.dram_size) // MIB} MiB{pool}"
            "; Ctrl-C or SIGTERM to leave",
        )

    def _say(self, event: dict[str, Any], line: str) -> None:
        if self._as_json:
            print(json.dumps(event), file=self._out, flush=True)
        else:
            Console(file=self._out, highlight=False, soft_wrap=True).print(line)
            self._out.flush()
