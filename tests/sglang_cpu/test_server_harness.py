# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""The server harness: it waits, measures, explains a failure, and leaves no process behind."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("psutil")

import psutil  # type: ignore[import-untyped]

from scripts.sglang_cpu.server import (
    RequestError,
    ServerStartError,
    SGLangServer,
    cpu_environment,
    model_arguments,
)

FAKE = (sys.executable, str(Path(__file__).with_name("fake_server.py")))


def fake_server(folder: Path, mode: str = "ok", start_timeout_s: float = 60.0) -> SGLangServer:
    return SGLangServer(
        folder,
        env={"FAKE_SERVER": mode},
        log_path=folder / "server.log",
        start_timeout_s=start_timeout_s,
        progress=None,
        launcher=FAKE,
    )


def child_pid(server: SGLangServer) -> int:
    match = re.search(r"child=(\d+)", server.log_text())
    assert match, server.log_text()
    return int(match.group(1))


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def write_config(folder: Path, **config: object) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_server_answers_and_leaves_no_process_behind(tmp_path: Path) -> None:
    with fake_server(tmp_path) as server:
        answer = server.generate([10, 11], 4)
        pids = [server.pid, child_pid(server)]
        assert server.server_info() == {"version": "fake"}
        assert server.peak_rss_bytes() > server.pss_bytes() > 1e6
    assert answer.output_ids == [11, 12, 13, 14]
    assert (answer.prompt_tokens, answer.cached_tokens) == (2, 3)
    assert answer.cached_tokens_details == {"device": 1, "host": 0, "storage": 2}
    assert answer.ttft_s is not None
    assert 0 < answer.ttft_s <= answer.total_s
    assert all(pid is not None and is_gone(pid) for pid in pids)
    assert server.peak_rss_bytes() > 1e6  # still known when the processes are gone


def test_streamed_and_whole_answers_agree(tmp_path: Path) -> None:
    with fake_server(tmp_path) as server:
        streamed = server.generate([10], 4)
        whole = server.generate([10], 4, stream=False)
    assert streamed.output_ids == whole.output_ids
    assert whole.ttft_s is None


def test_answers_come_in_the_order_of_the_prompts(tmp_path: Path) -> None:
    with fake_server(tmp_path) as server:
        answers = server.generate_many([[10 * n] for n in range(12)], concurrency=4)
    assert [answer.output_ids[0] for answer in answers] == [10 * n + 1 for n in range(12)]


def test_a_refused_request_carries_status_and_reason(tmp_path: Path) -> None:
    with fake_server(tmp_path) as server:
        with pytest.raises(RequestError, match="the prompt is too long") as caught:
            server.generate([400])
        assert caught.value.status == 400
        with pytest.raises(RequestError, match="broke off"):
            server.generate([500])
    with pytest.raises(RequestError, match="no answer from"):
        server.generate([10])


def test_a_server_that_dies_early_shows_its_reason(tmp_path: Path) -> None:
    server = fake_server(tmp_path, "die")
    with pytest.raises(ServerStartError, match="ended with code 1") as caught, server:
        pytest.fail("it came up")
    first_line = str(caught.value).splitlines()[0]
    assert first_line.endswith("ValueError: 7 heads cannot be split over 2 ranks")


def test_a_server_that_never_answers_is_ended_in_time(tmp_path: Path) -> None:
    server = fake_server(tmp_path, "answer", start_timeout_s=2)
    started = time.monotonic()
    with pytest.raises(ServerStartError, match="gave no answer within 2 s"), server:
        pytest.fail("it came up")
    assert time.monotonic() - started < 20
    assert is_gone(child_pid(server))


def test_a_server_deaf_to_sigterm_is_ended_in_time(tmp_path: Path) -> None:
    with fake_server(tmp_path, "deaf") as server:
        started = time.monotonic()
        server.stop(timeout_s=1)
        assert 1 <= time.monotonic() - started < 20
        assert not server.is_running


def test_a_server_that_still_loads_is_not_asked_to_end(tmp_path: Path) -> None:
    server = fake_server(tmp_path, "deaf")
    server.start()
    started = time.monotonic()
    server.stop(timeout_s=60)
    assert time.monotonic() - started < 20
    assert not server.is_running


def test_kill_reaches_a_child_whose_parent_is_gone(tmp_path: Path) -> None:
    with fake_server(tmp_path) as server:
        child = child_pid(server)
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while server.is_running and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not is_gone(child)
        server.kill()
        assert is_gone(child)


def test_a_stopped_server_starts_again_on_its_port(tmp_path: Path) -> None:
    server = fake_server(tmp_path)
    with server:
        first_child = child_pid(server)
    with server:
        assert server.generate([10], 1).output_ids == [11]
        assert child_pid(server) != first_child  # log_text() starts anew
    assert server.log_path.read_text().count("child=") == 2


def test_a_server_is_asked_for_the_dtype_of_its_model(tmp_path: Path) -> None:
    arguments = model_arguments(write_config(tmp_path, torch_dtype="float32"))
    assert arguments == ("--model-path", str(tmp_path), "--dtype", "float32")


def test_an_mla_model_switches_its_hook_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SGLANG_CPU_MLA", raising=False)
    model = write_config(tmp_path, kv_lora_rank=64)
    chosen = cpu_environment(model, 1, {"SGLANG_PLUGINS": "ascend_direct"})
    assert chosen["SGLANG_CPU_MLA"] == "1"
    assert chosen["SGLANG_PLUGINS"] == "ascend_direct,mla_on_cpu"
    assert "SGLANG_CPU_MLA" not in cpu_environment(write_config(tmp_path), 1, {})


def test_each_rank_gets_a_core_and_loopback_no_proxy(tmp_path: Path) -> None:
    env = cpu_environment(tmp_path, 2, {})
    ranks = env["SGLANG_CPU_OMP_THREADS_BIND"].split("|")
    assert [int(core) in os.sched_getaffinity(0) for core in ranks] == [True, True]
    assert "127.0.0.1" in env["NO_PROXY"].split(",")


@pytest.mark.sglang
def test_the_real_server_says_why_it_cannot_start(tmp_path: Path) -> None:
    server = SGLangServer(tmp_path / "absent", log_path=tmp_path / "server.log", progress=None)
    with pytest.raises(ServerStartError, match="ended with code") as caught, server:
        pytest.fail("it came up")
    assert str(tmp_path / "absent") in str(caught.value)
