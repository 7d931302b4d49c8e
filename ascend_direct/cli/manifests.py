# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Text that installs a MetaService: MemCache's configuration file, a systemd unit, manifests.

Owns the texts only. They start `ascend-direct meta`, which checks its settings at each start. TLS
is in none of them: paths of keys come by the environment, or from the file itself.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

# Keys of MemCache's own file (MMC_META_CONFIG_PATH, memcache-hybrid 1.3.0).
_FILE_KEYS = {
    "meta_service_url": "ock.mmc.meta_service_url",
    "config_store_url": "ock.mmc.meta_service.config_store_url",
    "metrics_url": "ock.mmc.meta_service.metrics_url",
    "evict_threshold_high": "ock.mmc.evict_threshold_high",
    "evict_threshold_low": "ock.mmc.evict_threshold_low",
    "log_path": "ock.mmc.log_path",
    "log_level": "ock.mmc.log_level",
}

_MANIFESTS = """\
# kubectl create configmap ascend-direct --from-file={name}
apiVersion: apps/v1
kind: Deployment
metadata:
  name: metaservice
spec:
  replicas: 1
  strategy:
    type: Recreate
  selector:
    matchLabels:
      app: metaservice
  template:
    metadata:
      labels:
        app: metaservice
    spec:
      containers:
        - name: metaservice
          image: {image}
          command:
{words}          env:
            - name: POD_IP
              valueFrom:
                fieldRef:
                  fieldPath: status.podIP
{own}          readinessProbe:
            httpGet:
              path: /health
              port: {metrics_port}
          volumeMounts:
            - name: config
              mountPath: {folder}
      volumes:
        - name: config
          configMap:
            name: ascend-direct
---
apiVersion: v1
kind: Service
metadata:
  name: metaservice
spec:
  selector:
    app: metaservice
  ports:
{listed}"""


def config_file(options: dict[str, Any]) -> str:
    """For MemCache's own launcher; `options` by the native service's names."""
    return "".join(f"{_FILE_KEYS[name]} = {value}\n" for name, value in options.items())


def _command(source: str, options: dict[str, Any]) -> list[str]:
    return [
        *("ascend-direct", "meta", "--config", source),
        *("--evict-above", str(options["evict_threshold_high"])),
        *("--evict-to", str(options["evict_threshold_low"])),
        *("--log-dir", str(options["log_path"])),
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


def kubernetes(source: str, options: dict[str, Any], image: str) -> str:
    """A Deployment of one and its Service. Servers name the Service in their URLs.

    The file at `source` comes from the ConfigMap `ascend-direct`, key as its name says.
    """
    ports = {
        name: urlsplit(options[f"{name}_url"]).port
        for name in ("meta_service", "config_store", "metrics")
    }
    folder, _, name = source.removeprefix("@").rpartition("/")
    own = "".join(
        f"""\
            - name: ASCEND_DIRECT_MEMCACHE__{part.upper()}_URL
              value: "{"http" if part == "metrics" else "tcp"}://$(POD_IP):{port}"
"""
        for part, port in ports.items()
    )
    words = "".join(f"            - {_quoted(word)}\n" for word in _command(source, options))
    listed = "".join(
        f"    - name: {part.replace('_', '-')}\n      port: {port}\n"
        for part, port in ports.items()
    )
    return _MANIFESTS.format(
        name=name,
        image=_quoted(image),
        words=words,
        own=own,
        metrics_port=ports["metrics"],
        folder=_quoted(folder or "/"),
        listed=listed,
    )


def _quoted(word: str) -> str:
    escaped = word.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
