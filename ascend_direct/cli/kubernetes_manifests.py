# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Text that installs MetaService on Kubernetes: one, or several of which one is elected leader.

Owns the texts only; they start `ascend-direct meta` with the servers' file, from a ConfigMap. What
the election needs (memcache-hybrid 1.3.0, meta_service_leader_election.py in its wheel): three
environment variables, a Lease that is there before, the rights to read and replace that Lease and
to read and patch its own pod. The leader gives its pod the label `role: master`, the others have
`role: backup`, and the Service selects the former.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

NAME = "metaservice"
# After so long without a word from the leader another takes over; it renews every 3 s.
LEASE_S = 10

_HEAD = """\
# kubectl create configmap ascend-direct --from-file={name}{namespaced}
# Servers and members name the Service: {urls}
"""
_HA_HEAD = """\
# {replicas} MetaServices, of which MemCache elects a leader; the image needs the Python package
# kubernetes. Evidence: the election ran against a stand-in of Kubernetes' API (E2), these manifests
# on no cluster (E0).
"""
_DEPLOYMENT = """\
apiVersion: apps/v1
kind: Deployment
metadata:
  name: metaservice
{at}spec:
  replicas: {replicas}
{strategy}  selector:
    matchLabels:
      app: metaservice
  template:
    metadata:
      labels:
        app: metaservice
{role}    spec:
{pod}      containers:
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
              mountPath: {path}
              subPath: {key}
      volumes:
        - name: config
          configMap:
            name: ascend-direct
---
apiVersion: v1
kind: Service
metadata:
  name: metaservice
{at}spec:
  selector:
    app: metaservice
{leader}  ports:
{listed}"""
_HA_POD = """\
      serviceAccountName: metaservice
      topologySpreadConstraints:
        - maxSkew: 1
          topologyKey: kubernetes.io/hostname
          whenUnsatisfiable: ScheduleAnyway
          labelSelector:
            matchLabels:
              app: metaservice
"""
_HA_ENVIRONMENT = """\
            - name: META_LEASE_NAME
              value: metaservice
            - name: META_POD_NAME
              valueFrom:
                fieldRef:
                  fieldPath: metadata.name
            - name: META_NAMESPACE
              valueFrom:
                fieldRef:
                  fieldPath: metadata.namespace
"""
_ELECTION = """\
apiVersion: coordination.k8s.io/v1
kind: Lease
metadata:
  name: metaservice
{at}spec:
  leaseDurationSeconds: {lease_s}
---
apiVersion: v1
kind: ServiceAccount
metadata:
  name: metaservice
{at}---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata:
  name: metaservice
{at}rules:
  - apiGroups: [coordination.k8s.io]
    resources: [leases]
    resourceNames: [metaservice]
    verbs: [get, update]
  - apiGroups: [""]
    resources: [pods]
    verbs: [get, patch]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata:
  name: metaservice
{at}subjects:
  - kind: ServiceAccount
    name: metaservice
{subject_at}roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: Role
  name: metaservice
---
"""


def manifests(
    source: str,
    command: Sequence[str],
    options: dict[str, Any],
    image: str,
    *,
    replicas: int,
    namespace: str,
) -> str:
    """A Deployment and its Service; with several replicas also what their election needs.

    Args:
        source: `@/path` of the servers' file; the ConfigMap `ascend-direct` has its name as key.
        command: what a pod runs.
        options: MetaService's, by the native service's names; of its URLs the ports are used.
        namespace: of all objects; empty for kubectl's own, which an election cannot do with.
    """
    several = replicas > 1
    path = source.removeprefix("@")
    name = path.rpartition("/")[2]
    ports = {
        part: urlsplit(options[f"{part}_url"]).port
        for part in ("meta_service", "config_store", "metrics")
    }
    at = f"  namespace: {quoted(namespace)}\n" if namespace else ""
    installed = _DEPLOYMENT.format(
        at=at,
        replicas=replicas,
        strategy="" if several else "  strategy:\n    type: Recreate\n",
        role="        role: backup\n" if several else "",
        leader="    role: master\n" if several else "",
        pod=_HA_POD if several else "",
        image=quoted(image),
        words="".join(f"            - {quoted(word)}\n" for word in command),
        own=_own_addresses(ports) + (_HA_ENVIRONMENT if several else ""),
        metrics_port=ports["metrics"],
        path=quoted(path),
        key=quoted(name),
        listed="".join(_port(part, port) for part, port in ports.items()),
    )
    head = _head(name, namespace, ports)
    if not several:
        return head + installed
    election = _ELECTION.format(at=at, subject_at=f"  {at}", lease_s=LEASE_S)
    return head + _HA_HEAD.format(replicas=replicas) + election + installed


def _head(name: str, namespace: str, ports: dict[str, int | None]) -> str:
    address = f"{NAME}.{namespace}" if namespace else NAME
    urls = ", ".join(f"{_scheme(part)}://{address}:{port}" for part, port in ports.items())
    return _HEAD.format(name=name, namespaced=f" -n {namespace}" if namespace else "", urls=urls)


def _scheme(part: str) -> str:
    return "http" if part == "metrics" else "tcp"


def _own_addresses(ports: dict[str, int | None]) -> str:
    """A pod listens at its own address, whatever the file says."""
    return "".join(
        f"            - name: ASCEND_DIRECT_MEMCACHE__{part.upper()}_URL\n"
        f'              value: "{_scheme(part)}://$(POD_IP):{port}"\n'
        for part, port in ports.items()
    )


def _port(part: str, port: int | None) -> str:
    return f"    - name: {part.replace('_', '-')}\n      port: {port}\n"


def quoted(word: str) -> str:
    """A YAML scalar."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
