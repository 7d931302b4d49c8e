# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Every option: name, unit, default, check.

Owns the validation of single values. How options are read (JSON, @file, environment) and how errors
are told is config_text's; what a *server mode* allows is integration/mode.py's; what a *machine*
allows is each store's `problems` and `open`. docs/configuration.md is generated from here.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from ascend_direct import config_text
from ascend_direct.errors import ConfigError

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
_UNITS = {"": 1, "B": 1, "KB": KIB, "MB": MIB, "GB": GIB, "TB": GIB << 10}

Milliseconds = Annotated[int, Field(ge=1, le=600_000)]
Protocol = Literal["host_shm", "host_tcp", "host_rdma", "device_rdma", "device_sdma"]
WritePolicy = Literal["write_through", "write_through_selective", "off"]


def parse_bytes(text: str | int) -> int:
    """Bytes of ``"512MB"``, ``"1GB"``, ``1024``; units are powers of 1024, as MemCache reads them.

    Raises:
        ValueError: not a size.
    """
    match = re.fullmatch(r"\s*([0-9]+)\s*([KMGT]?B?)\s*", str(text).upper())
    unit = match and (match[2] if match[2].endswith("B") or not match[2] else match[2] + "B")
    if match is None or unit not in _UNITS:
        raise ValueError(f"{text!r} is not a size; write for example 512MB or 4GB")
    return int(match[1]) * _UNITS[unit]


def _size(value: Any) -> Any:
    return parse_bytes(value) if isinstance(value, (str, int)) else value


def _size_text(text: str) -> str:
    parse_bytes(text)
    return text


def _tcp_url(url: str) -> str:
    match = re.fullmatch(r"tcp://(?:[^\s/:]+|\[[0-9A-Fa-f:]+\]):([0-9]{1,5})", url)
    if match is None or not 0 < int(match[1]) < 1 << 16:
        raise ValueError(f"{url!r} is not tcp://host:port; use for example tcp://10.0.0.1:5000")
    return url


def _http_url(url: str) -> str:
    match = re.fullmatch(r"https?://[^\s/]+:([0-9]{1,5})", url)
    if url and (match is None or not 0 < int(match[1]) < 1 << 16):
        raise ValueError(f"{url!r} is not http://host:port; use for example http://10.0.0.1:8000")
    return url


def _absolute(path: str) -> str:
    if not path.startswith(("/", "~")) or "\0" in path:
        raise ValueError(f"{path!r} is not an absolute path; use one such as /dev/shm/pages")
    return path


Bytes = Annotated[int, BeforeValidator(_size), Field(ge=MIB, le=GIB << 20)]
# Kept as text, as MemCache wants it; a plain number in JSON is bytes.
Size = Annotated[
    str,
    BeforeValidator(lambda value: str(value) if type(value) is int else value),
    AfterValidator(_size_text),
]
TcpUrl = Annotated[str, AfterValidator(_tcp_url)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is int:
            raise ValueError("true and false are not numbers; use a whole number")
        return value


class TlsConfig(_Section):
    """TLS between MemCache clients and MetaService; the fields are MemCache's, passed through."""

    enabled: bool = Field(False, description="Encrypt and authenticate MemCache connections.")
    ca_path: str = Field("", description="Certificate authority that signed the peers.")
    ca_crl_path: str = Field("", description="Revocation list; empty for none.")
    cert_path: str = Field("", description="This host's certificate.")
    key_path: str = Field("", description="This host's private key.")
    key_pass_path: str = Field("", description="File with the key's passphrase; empty for none.")
    package_path: str = Field("", description="Directory of the OpenSSL libraries MemCache loads.")
    decrypter_path: str = Field("", description="Library that decrypts the passphrase file.")

    def __repr_args__(self) -> list[tuple[str | None, Any]]:
        """Where keys lie is not for logs, whoever prints this."""
        return [("enabled", self.enabled)]

    @model_validator(mode="after")
    def _complete(self) -> TlsConfig:
        missing = [n for n in ("ca_path", "cert_path", "key_path") if not getattr(self, n)]
        if self.enabled and missing:
            raise ValueError(f"TLS is enabled; set {', '.join(missing)} too")
        return self


class MemcacheConfig(_Section):
    """Section ``memcache``: how to join an Ascend MemCache pool."""

    meta_service_url: TcpUrl = Field(
        "tcp://127.0.0.1:5000", description="MetaService address, as its own configuration has it."
    )
    config_store_url: TcpUrl = Field(
        "tcp://127.0.0.1:6000", description="Config store address of the same MetaService."
    )
    metrics_url: Annotated[str, AfterValidator(_http_url)] = Field(
        "",
        description="HTTP address of MetaService: start-up waits there until members are linked; "
        "doctor and pool stats, ls and clear ask it. Empty: none of that.",
    )
    protocol: Protocol = Field(
        "host_tcp", description="Data path: device_sdma on A3, device_rdma on A2, host_* elsewhere."
    )
    hcom_url: TcpUrl = Field(
        "tcp://127.0.0.1:7000", description="This process's own address for host_tcp/host_rdma."
    )
    dram_size: Size = Field("0", description="DRAM this server adds to the pool; 0 = pure client.")
    max_dram_size: Size = Field(
        "64GB", description="Largest dram_size of any member; must be the same on all."
    )
    hbm_size: Size = Field("0", description="HBM this server adds to the pool.")
    world_size: int = Field(256, ge=1, le=1024, description="Most members; the same on all.")
    replicas: int = Field(1, ge=1, le=8, description="Copies of each page, on different members.")
    preferred_members: tuple[str, ...] = Field(
        (), description="Local service ids that should hold this server's pages."
    )
    connect_timeout_ms: Milliseconds = Field(
        60_000, description="How long start-up waits for MetaService and for the members' links."
    )
    log_level: Literal["debug", "info", "warn", "error"] = Field(
        "error", description="Log level of the MemCache client library."
    )
    tls: TlsConfig = Field(default_factory=TlsConfig, description="TLS fields.")

    @model_validator(mode="after")
    def _plausible(self) -> MemcacheConfig:
        dram_bytes = parse_bytes(self.dram_size)
        problems = []
        if dram_bytes > parse_bytes(self.max_dram_size):
            problems.append("dram_size is larger than max_dram_size; use less, or raise both")
        if self.protocol.startswith("device_") and dram_bytes % GIB:
            problems.append(f"dram_size must be whole gigabytes with {self.protocol}; use 1GB")
        if problems:
            raise ValueError("; ".join(problems))
        return self


class LocalConfig(_Section):
    """Section ``local``: the embedded store, shared by the processes of one host."""

    path: Annotated[str, AfterValidator(_absolute)] = Field(
        "/dev/shm/ascend_direct", description="Directory, on tmpfs or SSD; created if absent."
    )
    size_bytes: Bytes = Field(
        4 * GIB, description="Bound on stored bytes; least recently used pages go first."
    )
    sync: bool = Field(
        False, description="fsync every write: only for pages that must outlive power."
    )


class DirectConfig(_Section):
    """The whole configuration: ``--hierarchical-cache-direct-config`` plus the environment."""

    store: str = Field(
        "auto",
        description="memcache, local, an installed provider, or auto: memcache if installed.",
    )
    memcache: MemcacheConfig = Field(default_factory=MemcacheConfig, description="See below.")
    local: LocalConfig = Field(default_factory=LocalConfig, description="See below.")
    provider: dict[str, Any] = Field(
        default_factory=dict, description="Options of a third-party store, passed to it unread."
    )
    on_pool_unavailable: Literal["fail", "degrade"] = Field(
        "fail",
        description="A pool that is unreachable at start: fail ends the server, degrade serves "
        "without the pool and attaches when it appears.",
    )
    verify: Literal["off", "sample", "all"] = Field(
        "off",
        description="Check loaded pages against a digest stored beside them: none, one page in 16, "
        "or all; all uses only pages that were stored with all.",
    )
    transfer: Literal["auto", "scatter", "packed"] = Field(
        "scatter",
        description="How a page crosses to the pool: scatter, fragment by fragment; packed, copied "
        "into one block first; auto measures both on an accelerator, and scatters from the CPU.",
    )
    load_mode: Literal["sync", "lookahead"] = Field(
        "sync",
        description="When pages are read: sync, while the prefill batch is built; lookahead, while "
        "the request waits and others run.",
    )
    lookahead_percent: int = Field(
        25, ge=1, le=100, description="lookahead: most of the KV pool that reads may hold."
    )
    replica_read: Literal["auto", "sharded", "every_rank"] = Field(
        "auto",
        description="MLA under TP: ranks read a share each and exchange it, or all read all; auto "
        "measures both.",
    )
    heads_per_object: int = Field(
        0,
        ge=0,
        description="GQA: KV heads per stored object. Servers of one model share pages across TP "
        "sizes if all set it to the heads of a rank at the largest TP; 0 = all heads of a rank.",
    )
    write_policy: WritePolicy = Field(
        "write_through", description="Store every page, pages hit again, or nothing."
    )
    selective_hits: int = Field(
        2, ge=2, le=100, description="write_through_selective: store a prefix at its n-th use."
    )
    decode_stride_tokens: int = Field(
        1024,
        ge=0,
        description="PD decode: a running answer is stored each time it has grown by this many "
        "tokens; 0 stores it when it ends.",
    )
    min_load_tokens: int = Field(128, ge=1, description="Shorter pool hits are recomputed.")
    admission: Literal["floor", "cost"] = Field(
        "floor",
        description="Which hits are loaded: floor, all of min_load_tokens or more; cost, those of "
        "them that load faster than they compute, as measured while serving.",
    )
    lookup_timeout_ms: Milliseconds = Field(
        200, description="Longest wait of the scheduler for a lookup; past it, a miss."
    )
    load_timeout_ms: Milliseconds = Field(
        2_000, description="Longest wait of the scheduler for a load; past it, recompute."
    )
    store_timeout_ms: Milliseconds = Field(
        30_000,
        description="A page still queued for storing after this is dropped; while the pool does "
        "not answer, after load_timeout_ms.",
    )
    lookup_memo_ms: Milliseconds = Field(
        500, description="How long a waiting request's lookup answer is reused."
    )
    belief_pages: int = Field(
        262_144, ge=0, description="Page keys remembered as stored; 0 asks the pool each time."
    )
    belief_ttl_ms: Milliseconds = Field(
        60_000, description="How long a page is believed stored without asking."
    )
    store_queue_bytes: Bytes = Field(
        4 * GIB,
        description="KV bytes that may wait for storing, at most half the KV pool; more are "
        "dropped and counted.",
    )
    batch_bytes: Bytes = Field(
        512 * MIB,
        description="Bytes per native call: each call costs a question to MetaService, and a load "
        "that is given up ends with its call.",
    )
    model_id: str = Field(
        "", description="Name of the weights in page keys; empty: derived from the weight files."
    )
    weights_fingerprint: Literal["full", "sampled"] = Field(
        "full", description="How weight files are told apart when model_id is empty."
    )
    log_interval_s: int = Field(60, ge=0, description="Seconds between status lines; 0 for none.")

    @classmethod
    def load(
        cls, source: str | Mapping[str, Any] | None, environ: Mapping[str, str] = os.environ
    ) -> DirectConfig:
        """Build from JSON text, ``@file``, a mapping or None, then overlay the environment.

        ``ASCEND_DIRECT_MEMCACHE__HCOM_URL`` sets ``memcache.hcom_url``; the environment wins.

        Raises:
            ConfigError: with every problem found, not just the first.
        """
        reasons: list[str] = []
        names = list(option_names())
        data = config_text.read(source, reasons)
        overlay = config_text.read_environment(environ, names, reasons)
        try:
            config = cls.model_validate(config_text.merged(data, overlay))
        except ValidationError as error:
            reasons.extend(config_text.sentences(error, names))
        if reasons:
            raise ConfigError(reasons)
        return config

    def public_dict(self) -> dict[str, Any]:
        """What differs from the defaults, without the TLS section; fit for logs."""
        return self.model_dump(mode="json", exclude_defaults=True, exclude={"memcache": {"tls"}})

    def secret_environment(self) -> dict[str, str]:
        """The rest, as variables that `load` reads in a child process."""
        tls = self.memcache.tls.model_dump(exclude_defaults=True)
        return {config_text.variable(f"memcache.tls.{n}"): str(v) for n, v in tls.items()}

    def describe(self) -> str:
        """`public_dict` as one line of JSON."""
        return json.dumps(self.public_dict(), sort_keys=True)


def option_names(model: type[BaseModel] = DirectConfig, prefix: str = "") -> Iterator[str]:
    """Dotted names of all options, sections included as their members."""
    for name, option in model.model_fields.items():
        annotation = option.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from option_names(annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


PROTOCOLS: tuple[str, ...] = get_args(Protocol)
