# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""`ascend-direct pool stats` and `pool ls`: what they show, and what they say of odd answers."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from typer.testing import CliRunner

from ascend_direct.cli.main import app

runner = CliRunner()
A, B = "0123456789abcdef", "fedcba9876543210"
KEYS = [f"ad1:{A}:h0-1:{n:064x}" for n in range(3)] + [f"ad1:{A}:h2-3:{n:064x}" for n in range(3)]
KEYS += [f"ad1:{B}:-:{n:064x}" for n in range(2)] + ["another program's"]
SEGMENTS = [
    {"segment_name": "rank-0-dram", "medium": "DRAM", "total_bytes": 64 << 20, "used_bytes": 0},
    {
        "segment_name": "rank-1-dram",
        "medium": "DRAM",
        "total_bytes": 64 << 20,
        "used_bytes": 32 << 20,
    },
]
LINKS = {"activeRanks": 2, "connectedLinks": 2, "expectedLinks": 2}
CLUSTER = {"mf_cluster": [{"server": {"groupManager": {"linkSummary": LINKS}, "worldSize": 8}}]}
METRICS = """\
# HELP sglang:prompt_tokens_total Number of prefill tokens processed.
sglang:prompt_tokens_total{model_name="m"} 4000.0
sglang:cached_tokens_total{cache_source="device",model_name="m"} 500.0
sglang:cached_tokens_total{cache_source="storage_ascend_direct",model_name="m"} 1000.0
"""


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = self.server.answers.get(self.path)  # type: ignore[attr-defined]
        text = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(404 if body is None else 200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    """Answers as a MetaService and as a server."""
    monkeypatch.setenv("COLUMNS", "200")
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    server.answers = {  # type: ignore[attr-defined]
        "/metrics/summary": "keys=9 evict=4 hbm_used=0/0 dram_used=5/134217728 get_req=12",
        "/api/v1/capacity/segment_remaining": {"segments": SEGMENTS},
        "/api/v1/mf/cluster_status": CLUSTER,
        "/get_all_keys": "\n".join(KEYS) + "\n",
        "/metrics": METRICS,
    }
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def url(service: ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{service.server_address[1]}"


def ask(service: ThreadingHTTPServer, *arguments: str) -> Any:
    config = json.dumps({"memcache": {"metrics_url": url(service)}})
    return runner.invoke(app, ["pool", *arguments, "--config", config])


def test_stats_adds_up_members_and_tells_keys_and_evictions(service) -> None:
    result = ask(service, "stats", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["keys"], found["evicted"], found["members"]) == (9, 4, 2)
    assert (found["used_bytes"], found["total_bytes"]) == (32 << 20, 128 << 20)
    assert [segment["name"] for segment in found["segments"]] == ["rank-0-dram", "rank-1-dram"]
    assert found["counters"] == {"keys": 9, "evict": 4, "get_req": 12}


def test_stats_as_text_has_a_row_for_each_member_and_the_sum(service) -> None:
    lines = ask(service, "stats").stdout.splitlines()
    assert "9 keys, 4 evicted" in lines[0]
    assert "2 members, all linked" in lines[0]
    assert any("rank-1-dram" in line and "50%" in line for line in lines)
    assert any("all" in line and "128" in line and "25%" in line for line in lines[1:])


def test_a_servers_hits_are_its_own_counters(service) -> None:
    found = json.loads(ask(service, "stats", "--json", "--server", url(service)).stdout)
    assert found["servers"] == [
        {"server": url(service), "prompt_tokens": 4000, "pool_tokens": 1000, "share": 0.25}
    ]
    assert "1000 of 4000" in ask(service, "stats", "--server", url(service)).stdout


def test_ls_counts_objects_by_namespace_and_rank_part(service) -> None:
    found = json.loads(ask(service, "ls", "--json").stdout)["namespaces"]
    assert found == [
        {"namespace": A, "objects": 6, "parts": {"h0-1": 3, "h2-3": 3}},
        {"namespace": B, "objects": 2, "parts": {"-": 2}},
        {"namespace": "", "objects": 1, "parts": {"": 1}},
    ]
    text = ask(service, "ls").stdout
    assert A in text
    assert "h0-1 3, h2-3 3" in text


def test_ls_of_an_empty_pool_says_so(service) -> None:
    service.answers["/get_all_keys"] = ""
    result = ask(service, "ls")
    assert result.exit_code == 0
    assert "no keys" in result.stdout


@pytest.mark.parametrize(
    ("path", "answer"),
    [
        ("/metrics/summary", None),
        ("/metrics/summary", "<html>welcome</html>"),
        ("/api/v1/capacity/segment_remaining", {"segments": [{"segment_name": "x"}]}),
        ("/api/v1/capacity/segment_remaining", "[" * 100_000),
        ("/metrics", None),
    ],
)
def test_an_answer_that_is_none_ends_with_3_and_the_reason(service, path, answer) -> None:
    service.answers[path] = answer
    result = ask(service, "stats", "--server", url(service))
    assert result.exit_code == 3
    assert "ascend-direct: stats:" in result.stderr
    assert result.stdout == ""


def test_without_an_http_address_or_a_pool_the_way_out_is_named() -> None:
    result = runner.invoke(app, ["pool", "stats", "--config", "{}"])
    assert result.exit_code == 2
    assert "set memcache.metrics_url" in result.stderr
    config = json.dumps({"memcache": {"metrics_url": "http://127.0.0.1:9"}})
    assert runner.invoke(app, ["pool", "ls", "--config", config]).exit_code == 3


@pytest.mark.parametrize("command", ["stats", "ls"])
def test_their_help_has_the_exit_codes(command) -> None:
    text = " ".join(runner.invoke(app, ["pool", command, "--help"]).stdout.split())
    assert "Exit codes: 0 shown; 2 bad configuration; 3 the pool" in text
