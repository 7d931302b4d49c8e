# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Stands in for Kubernetes' API: Leases and pods over HTTP, with the rights of a Role.

Owns what an election can see: optimistic locking by resourceVersion, labels, and 403 for whatever
the Role does not allow. Knows no other objects, no watches and no TLS.
"""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

VERBS = {"GET": "get", "PUT": "update", "PATCH": "patch", "POST": "create", "DELETE": "delete"}


class KubernetesApi:
    """Serves until `close`.

    Args:
        objects: manifests; of them the Lease is served, and the Role is enforced.
        pods: their names; they have the labels of the manifests' Deployment.
    """

    def __init__(self, objects: list[dict[str, Any]], pods: tuple[str, ...]) -> None:
        kinds = {one["kind"]: one for one in objects}
        self._rules = kinds["Role"]["rules"]
        self.namespace = kinds["Lease"]["metadata"]["namespace"]
        self._lock = threading.Lock()
        self.refused: list[str] = []
        labels = kinds["Deployment"]["spec"]["template"]["metadata"]["labels"]
        self._objects = {("leases", kinds["Lease"]["metadata"]["name"]): kinds["Lease"]}
        for name in pods:
            metadata = {"name": name, "namespace": self.namespace, "labels": dict(labels)}
            spec = {"containers": [{"name": "metaservice", "image": "an-image"}]}
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}
            self._objects["pods", name] = pod
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def kubeconfig(self, path: Path) -> Path:
        """A file by which clients find this server."""
        url = f"http://127.0.0.1:{self._server.server_port}"
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "here", "cluster": {"server": url}}],
            "users": [{"name": "anyone", "user": {"token": "none"}}],
            "contexts": [{"name": "here", "context": {"cluster": "here", "user": "anyone"}}],
            "current-context": "here",
        }
        path.write_text(json.dumps(config))
        return path

    def pods_labelled(self, **labels: str) -> list[str]:
        """Names of the pods that a Service with this selector sends clients to."""
        with self._lock:
            return [
                name
                for (kind, name), one in self._objects.items()
                if kind == "pods" and labels.items() <= one["metadata"]["labels"].items()
            ]

    def delete_pod(self, name: str) -> None:
        """As when its node is gone."""
        with self._lock:
            del self._objects["pods", name]

    def close(self) -> None:
        """End the server and its thread."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _allows(self, group: str, kind: str, verb: str, name: str) -> bool:
        return any(
            group in rule["apiGroups"]
            and kind in rule["resources"]
            and verb in rule["verbs"]
            and name in rule.get("resourceNames", [name])
            for rule in self._rules
        )

    def answer(self, method: str, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """What Kubernetes would say to one request about a namespaced object."""
        head, _, rest = path.partition("/namespaces/")
        namespace, kind, name = rest.split("?")[0].split("/")
        group = head.split("/")[2] if head.startswith("/apis/") else ""
        verb = VERBS[method]
        with self._lock:
            if not self._allows(group, kind, verb, name) or namespace != self.namespace:
                self.refused.append(f"{verb} {kind} {name}")
                return 403, {"kind": "Status", "code": 403, "reason": "Forbidden"}
            one = self._objects.get((kind, name))
            if one is None:
                return 404, {"kind": "Status", "code": 404, "reason": "NotFound"}
            if method == "PUT":
                known = one["metadata"].get("resourceVersion")
                if body["metadata"].get("resourceVersion") != known:
                    return 409, {"kind": "Status", "code": 409, "reason": "Conflict"}
                one["spec"] = body["spec"]
                one["metadata"]["resourceVersion"] = str(int(known or 0) + 1)
            elif method == "PATCH":
                one["metadata"]["labels"].update(body["metadata"]["labels"])
            return 200, json.loads(json.dumps(one))

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        api = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _serve(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length) or b"{}")
                code, answer = api.answer(self.command, self.path, body)
                content = json.dumps(answer).encode()
                self.send_response(code)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_PUT = do_PATCH = do_POST = do_DELETE = _serve

            def log_message(self, *_: Any) -> None:
                """Silent."""

        return Handler
