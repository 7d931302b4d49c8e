# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Text that installs a MetaService: MemCache's configuration file, a systemd unit, manifests.

Owns the texts but for Kubernetes', which is kubernetes_manifests'. They start `ascend-direct meta`,
which checks its settings at each start. TLS is in none of them: paths of keys come by the
environment, or from the file itself.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ascend_direct.cli import kubernetes_manifests

# Keys of MemCache's own file (MMC_META_CONFIG_PATH, memcache-hybrid 1.3.0).
_FILE_KEYS = {
    "meta_service_url": "ock.mmc.meta_service_url",
    "config_store_url": "ock.mmc.meta_service.config_store_url",
    "metrics_url": "ock.mmc.meta_service.metrics_url",
    "evict_threshold_high": "ock.mmc.evict_threshold_high",
    "evict_threshold_low": "ock.mmc.evict_threshold_low",
    "log_path": "ock.mmc.log_path",
    "log_level": "ock.mmc.log_level",
    "ha_enable": "ock.mmc.meta.ha.enable",
}


def config_file(options: dict[str, Any]) -> str:
    """For MemCache's own launcher; `options` by the native service's names."""
    words = {True: "true", False: "false"}
    return "".join(f"{_FILE_KEYS[n]} = {words.get(v, v)}\n" for n, v in options.items())


def _command(source: str, options: dict[str, Any]) -> list[str]:
    return [
        *("ascend-direct", "meta", "--config", source),
        *("--evict-above", str(options["evict_threshold_high"])),
        *("--evict-to", str(options["evict_threshold_low"])),
        *("--log-dir", str(options["log_path"])),
        *(["--ha"] if options.get("ha_enable") else []),
    ]


def systemd_unit(source: str, options: dict[str, Any]) -> str:
    """A unit that restarts it; clients reconnect by themselves."""
    command = " ".join(word.replace("%", "%%") for word in _command(source, options))
    return f"""\
[Unit]
Description=MetaService of a MemCache pool
Wants=network-online.target
After=network-online.target

[Service]
# CANN's environment and the virtual environment's PATH; adapt both.
EnvironmentFile=-/etc/default/ascend-direct
ExecStart=/usr/bin/env {command}
Restart=on-failure
RestartSec=2
TimeoutStopSec=20
LimitMEMLOCK=infinity

[Install]
WantedBy=multi-user.target
"""


class Cluster(NamedTuple):
    """What --print kubernetes is told.

    Attributes:
        namespace: empty for kubectl's own; an election must know it.
    """

    image: str
    replicas: int
    namespace: str


def kubernetes(source: str, options: dict[str, Any], cluster: Cluster) -> str:
    """A Deployment and its Service; with several replicas, what MemCache's election needs."""
    several = cluster.replicas > 1
    if several:
        options = {**options, "ha_enable": True}
    return kubernetes_manifests.manifests(
        source,
        _command(source, options),
        options,
        cluster.image,
        replicas=cluster.replicas,
        namespace=cluster.namespace or ("default" if several else ""),
    )
