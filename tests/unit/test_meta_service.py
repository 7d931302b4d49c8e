# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""MetaService's answers come from the network: whatever they are, nothing is raised or believed."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from ascend_direct.store.meta_service import Links, MetaServiceHttp, Usage


class Service(ThreadingHTTPServer):
    """Answers from a dictionary over kept connections, and counts them."""

    daemon_threads = True
    answers: dict[str, Any]
    connections = 0
    url = ""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Service

    def setup(self) -> None:
        super().setup()
        self.server.connections += 1

    def do_GET(self) -> None:
        answer = self.server.answers.get(self.path)
        body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(200 if answer is not None else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def service() -> Iterator[Service]:
    with Service(("127.0.0.1", 0), _Handler) as server:
        server.url = f"http://127.0.0.1:{server.server_port}"
        server.answers = {
            "/api/v1/mf/cluster_status": status(2, 1, 2, 8),
            "/api/v1/capacity/usage": {
                "cpu": {"total_bytes": 100, "used_bytes": 30},
                "npu": {"total_bytes": 10, "used_bytes": 0},
            },
            "/metrics/summary": b"keys=7 evict=0",
        }
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def status(members: Any, connected: Any, expected: Any, world_size: Any) -> dict[str, Any]:
    summary = {"activeRanks": members, "connectedLinks": connected, "expectedLinks": expected}
    server = {"groupManager": {"linkSummary": summary}, "worldSize": world_size}
    return {"mf_cluster": [{"server": server}]}


@pytest.fixture
def asking(service: Service) -> Iterator[MetaServiceHttp]:
    client = MetaServiceHttp(service.url, timeout_s=2)
    yield client
    client.close()


def test_links_and_usage_are_read_over_one_connection(
    service: Service, asking: MetaServiceHttp
) -> None:
    assert asking.links() == Links(2, 1, 2, 8)
    assert asking.usage() == Usage(110, 30, 7)
    assert service.connections == 1


def test_before_anybody_joined_there_is_no_world_size(
    service: Service, asking: MetaServiceHttp
) -> None:
    service.answers["/api/v1/mf/cluster_status"] = status(0, 0, 0, (1 << 32) - 1)
    assert asking.links() == Links(0, 0, 0, None)


def test_waiting_ends_when_every_member_is_linked_or_time_is_up(
    service: Service, asking: MetaServiceHttp
) -> None:
    assert asking.wait_linked(0.3) == Links(2, 1, 2, 8)
    later = threading.Timer(
        0.2, lambda: service.answers.update({"/api/v1/mf/cluster_status": status(2, 2, 2, 8)})
    )
    later.start()
    links = asking.wait_linked(10)
    later.join()
    assert links is not None
    assert links.complete


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\xff\xfe",
        b"[" * 100_000,
        [],
        {"mf_cluster": []},
        status("2", 1, 2, 8),
        status(-2, 1, 2, 8),
        status(True, 1, 2, 8),
        status(2, 1.5, 2, 8),
        None,
    ],
    ids=[
        "empty",
        "not text",
        "nested deeply",
        "a list",
        "no cluster",
        "text for a number",
        "negative",
        "a bool",
        "a fraction",
        "status 404",
    ],
)
def test_an_answer_of_another_form_is_no_answer(
    service: Service, asking: MetaServiceHttp, answer: Any
) -> None:
    service.answers = dict.fromkeys(service.answers, answer)
    assert asking.links() is None
    assert asking.usage() is None


def test_nobody_there_is_no_answer_and_a_restart_is_noticed(service: Service) -> None:
    gone = MetaServiceHttp("http://127.0.0.1:9", timeout_s=1)
    assert gone.links() is None
    client = MetaServiceHttp(service.url, timeout_s=2)
    assert client.links() is not None
    assert client._connection is not None
    assert client._connection.sock is not None
    client._connection.sock.shutdown(2)  # as a restarted service would leave it
    assert client.links() is not None
    client.close()
