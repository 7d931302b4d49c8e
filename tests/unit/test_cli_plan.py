# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""`ascend-direct plan` as a command: what it prints, draws, refuses, and claims of itself.

The simulation below it is test_planning's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ascend_direct.cli.main import app
from ascend_direct.cli.planning import validation

ROOT = Path(__file__).resolve().parents[2]
runner = CliRunner()
QWEN3_32B = {
    "hidden_size": 5120,
    "intermediate_size": 25600,
    "num_hidden_layers": 64,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "torch_dtype": "bfloat16",
}
SMALL = json.dumps({"requests": 400, "requests_per_s": 4, "think_s": 5})


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "Qwen3-32B"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(QWEN3_32B))
    return folder


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    lines = [
        {"timestamp": 0, "input_length": 1100, "output_length": 9, "hash_ids": [1, 2, 3]},
        {"timestamp": 9000, "input_length": 1600, "output_length": 9, "hash_ids": [1, 2, 4, 5]},
        {"timestamp": 20000, "input_length": 600, "output_length": 0, "hash_ids": [1, 6]},
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def plan(model: Path, *arguments: str, code: int = 0) -> dict[str, Any]:
    command = ["plan", "--model-config", str(model), "--tp", "4", "--instances", "1,3"]
    result = runner.invoke(app, [*command, "--json", *arguments])
    assert result.exit_code == code, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def refused(model: Path, *arguments: str) -> str:
    command = ["plan", "--model-config", str(model), "--tp", "4", "--synthetic", SMALL]
    if "--trace" in arguments:
        command = command[:-2]
    result = runner.invoke(app, [*command, *arguments])
    assert result.exit_code == 2, result.output
    assert not result.stdout
    return result.stderr


# ---- output -----------------------------------------------------------------------------------


def test_json_has_every_figure_for_every_number_of_instances(model: Path) -> None:
    found = plan(model, "--synthetic", SMALL)
    assert [row["instances"] for row in found["rows"]] == [1, 3]
    for row in found["rows"]:
        for served in (row["with_pool"], row["without_pool"]):
            ttft = served["ttft_ms"]
            assert 0 < ttft["p50"] <= ttft["p90"] <= ttft["p99"]
            assert served["hit_rate"] == pytest.approx(
                served["device_hit_rate"] + served["pool_hit_rate"]
            )
        assert row["without_pool"]["pool_hit_rate"] == 0
        assert row["with_pool"]["hit_rate"] <= found["pool_sizes"]["reuse_rate"]
        traffic = row["with_pool"]["pool"]
        assert 0 <= traffic["read_gb_per_s"] <= traffic["read_peak_gb_per_s"]
        assert 0 < traffic["written_gb_per_s"] <= traffic["written_peak_gb_per_s"]
        assert traffic["peak_bytes"] <= traffic["written_bytes"]
        assert traffic["peak_bytes"] <= found["fleet"]["pool_bytes"]
    three = found["rows"][1]
    assert three["with_pool"]["hit_rate"] > three["without_pool"]["hit_rate"]
    assert found["model"]["kv_bytes_per_token"] == 262_144
    assert found["model"]["rank_kv_bytes_per_token"] == 65_536
    assert found["break_even"]["prompts"][0]["tokens"] == 128
    assert set(found["validation"]) in (set(), {"date", "command", "limit_percent", "figures"})


def test_a_trace_is_replayed_and_its_hits_are_what_can_be_counted_by_hand(model, trace) -> None:
    found = plan(model, "--trace", str(trace), "--instances", "1")
    # Of the second prompt blocks 1 and 2, of the third block 1, each of 512 tokens.
    hits = found["rows"][0]["with_pool"]["hit_rate"] * found["trace"]["prompt_tokens"]
    assert hits == pytest.approx(1536)
    assert found["rows"][0]["with_pool"]["pool_hit_rate"] == 0  # all of them on the device
    apart = plan(model, "--trace", str(trace), "--instances", "3")["rows"][0]["with_pool"]
    assert apart["device_hit_rate"] == 0
    assert apart["pool_hit_rate"] * found["trace"]["prompt_tokens"] == pytest.approx(1536)


def test_text_shows_a_row_each_the_break_even_and_how_far_it_is_validated(model: Path) -> None:
    command = ["plan", "--model-config", str(model), "--tp", "4", "--instances", "1,1000"]
    result = runner.invoke(app, [*command, "--synthetic", SMALL])
    assert result.exit_code == 0, result.output
    rows = [line.split()[1] for line in result.stdout.splitlines() if line.startswith("│")]
    assert rows == ["1", "1,000"]
    assert "Qwen3-32B: GQA" in result.stdout
    assert "a load beats computing from 128 tokens on" in result.stdout
    assert "(E0)" in result.stdout
    assert "fewer than 20 requests an instance" in result.stdout
    assert validation.sentence(validation.record()) in result.stdout


def test_a_picture_is_drawn(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plan(model, "--synthetic", SMALL, "--plot", str(tmp_path / "plan.png"))
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_a_picture_is_refused_and_the_rest_works(model: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "--plot needs matplotlib" in refused(model, "--plot", "plan.png")
    assert plan(model, "--synthetic", SMALL)["rows"]


def test_measured_costs_replace_those_of_the_table(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "costs.json"
    file.write_text(json.dumps({"compute_us_per_token": 1000, "pair_ns": 0, "source": "ours"}))
    slow = plan(model, "--synthetic", SMALL, "--costs", f"@{file}")
    assert slow["costs"]["source"] == "ours"
    alone = slow["rows"][1]["without_pool"]
    assert alone["ttft_ms"]["p50"] > 1000
    fast = plan(model, "--synthetic", SMALL, "--costs", '{"prefill_tokens_per_s": 1e5}')
    assert fast["rows"][1]["without_pool"]["ttft_ms"]["p50"] < alone["ttft_ms"]["p50"]
    assert "prefill_tokens_per_s as given" in fast["costs"]["source"]


def test_a_pool_that_is_slower_than_computing_never_breaks_even(model: Path) -> None:
    found = plan(model, "--synthetic", SMALL, "--costs", '{"load_gb_per_s": 0.001}')
    assert [prompt["tokens"] for prompt in found["break_even"]["prompts"]] == [None, None]


def test_traffic_of_each_instance_grows_with_their_number(model: Path) -> None:
    one, three = plan(model, "--synthetic", SMALL, "--traffic", "each")["rows"]
    assert three["requests"] > 2 * one["requests"]
    assert three["requests_per_s"] == pytest.approx(3 * one["requests_per_s"], rel=0.3)


@pytest.mark.timeout(300)
def test_a_thousand_instances_and_a_hundred_thousand_requests_take_well_under_a_minute(
    model: Path,
) -> None:
    many = {"requests": 100_000, "requests_per_s": 100, "question_tokens": 512}
    begin_s = time.process_time()
    found = plan(model, "--synthetic", json.dumps(many), "--instances", "1000")
    assert found["rows"][0]["requests"] == 100_000
    assert time.process_time() - begin_s < 40


# ---- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--instances", "1,two"], "--instances 1,two: use whole numbers"),
        (["--instances", "0"], "use whole numbers of 1"),
        (["--pool-size", "much"], "--pool-size: 'much' is not a size"),
        (["--tp", "3"], "--tp 3 does not divide 8 KV heads evenly"),
        (["--tp", "1", "--hbm", "32GB"], "raise --tp, or give --device-tokens"),
        (["--device-tokens", "1000"], "an instance holds 1000: raise --tp or --device-tokens"),
        (["--costs", '{"speed": 1}'], "--costs: there is no speed; there are source, request_ms"),
        (["--costs", '{"pair_ns": -1}'], "--costs: pair_ns: Input should be greater"),
        (["--costs", "fast"], "--costs is not JSON"),
        (["--costs", "@/no/such/file"], "/no/such/file"),
        (["--synthetic", '{"turns": 0}'], "--synthetic: turns: Input should be greater"),
        (["--synthetic", '{"users": 1}'], "--synthetic: there is no users; there are requests"),
        (["--plot", "/no/such/folder/a.png"], "there is no folder /no/such/folder"),
        (["--trace", "/no/such/trace"], "--trace /no/such/trace:"),
        (["--trace", "x", "--synthetic", "{}"], "give one of them"),
        (["--trace", "x", "--block-tokens", "100"], "one must divide the other"),
    ],
)
def test_a_mistake_exits_with_2_and_says_what_to_do(model: Path, arguments, words) -> None:
    assert words in refused(model, *arguments)


def test_a_model_that_is_not_understood_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for text, words in (
        ("{", "config.json"),
        ("[]", "not a JSON object"),
        ("{}", "num_hidden_layers is None"),
        ('{"layer_types": ["full_attention", "sliding_attention"]}', "sliding_attention"),
    ):
        path.write_text(text)
        assert words in refused(path)
    assert "No such file" in refused(tmp_path / "absent")


def test_wrong_lines_of_a_trace_are_named_by_number(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    good = {"timestamp": 1, "input_length": 600, "output_length": 1, "hash_ids": [1, 2]}
    wrong = [
        ("{", "line 2: "),
        ("[]", "line 3: not a JSON object"),
        (json.dumps({**good, "input_length": 0}), "line 4: input_length is 0"),
        (json.dumps({**good, "output_length": "9"}), "line 5: output_length is '9'"),
        (json.dumps({**good, "timestamp": -1}), "line 6: timestamp is -1"),
        (json.dumps({**good, "hash_ids": [1, 2, 3, 4]}), "line 7: 4 hash_ids for input_length 600"),
        (json.dumps({**good, "hash_ids": [1, True]}), "line 8: hash_ids is not a list of whole"),
        (json.dumps({**good, "hash_ids": 7}), "line 9: hash_ids is not a list"),
    ]
    path.write_text("\n".join([json.dumps(good), *(line for line, _ in wrong)]))
    told = refused(model, "--trace", str(path))
    for _, words in wrong:
        assert words in told
    assert "line 1:" not in told
    path.write_text("\n".join(["nothing"] * 50))
    told = refused(model, "--trace", str(path))
    assert "line 10:" in told
    assert "line 11:" not in told
    assert "40 more lines are wrong" in told
    path.write_text("\n\n")
    assert "there is no request in it" in refused(model, "--trace", str(path))


# ---- claims -----------------------------------------------------------------------------------


def test_what_plan_says_of_its_validation_is_what_the_documents_show() -> None:
    found = validation.record()
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert found, "scripts/plan_check --record"
    assert f"Run of {found['date']}" in text
    for f in found["figures"]:
        row = f"| {f['name']} | {f['measured']:,}{f['unit']} | {f['predicted']:,}{f['unit']} | "
        assert row + f"{f['percent']:+.1f} % |" in text


def test_the_sentence_names_figures_outside_the_limit() -> None:
    figure = {"name": "mean TTFT", "unit": " ms", "measured": 100, "predicted": 130, "percent": 30}
    found = {"date": "2026-01-01", "command": "x", "limit_percent": 15, "figures": [figure]}
    assert "NOT within ±15 %: mean TTFT" in validation.sentence(found)
    found["figures"] = [{**figure, "predicted": 101, "percent": 1.0}]
    assert "all within ±15 %" in validation.sentence(found)
    assert validation.sentence({}) == validation.NOT_VALIDATED


def test_help_has_the_exit_codes_and_needs_neither_sglang_nor_memcache(model: Path) -> None:
    script = (
        "import sys; sys.modules.update(sglang=None, memcache_hybrid=None, torch=None)\n"
        "from ascend_direct.cli.main import app; app()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "plan", "--help"],
        env={**os.environ, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Exit codes: 0 planned; 2" in done.stdout
