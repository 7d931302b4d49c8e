# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""The offline `sglang.Engine` with `engine_args`: what one engine stored, the next one loads."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sglang_cpu.models import make_model
from sglang_cpu.server import cpu_environment
from two_instances.cluster import LocalPool

from .farm import START_TIMEOUT_S

PROMPT_TOKENS = 650
PAGE_SIZE = 64

SCRIPT = """
import json, sys

def main():
    import sglang
    from ascend_direct import engine_args

    job = json.loads(sys.argv[1])
    engine = sglang.Engine(
        model_path=job["model"], device="cpu", attention_backend="torch_native", dtype="float32",
        page_size=job["page_size"], max_total_tokens=8192, **engine_args(job["config"]),
    )
    try:
        greedy = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}
        for _ in range(2):
            got = engine.generate(input_ids=job["prompt"], sampling_params=greedy)
            tiers = got["meta_info"].get("cached_tokens_details") or {}
            answer = {"ids": got["output_ids"], "tiers": tiers}
            print("ANSWER", json.dumps(answer), flush=True)
    finally:
        engine.shutdown()

if __name__ == "__main__":
    main()
"""


def run_engine(script: Path, model: Path, prompt: list[int], pool: LocalPool) -> list[Any]:
    """Two answers of a fresh engine to the same prompt."""
    job = {"model": str(model), "page_size": PAGE_SIZE, "config": pool.options(), "prompt": prompt}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), json.dumps(job)],
        env=cpu_environment(model, 1, {"SGLANG_PLUGINS": "ascend_direct"}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=START_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert "Traceback" not in done.stdout, done.stdout[-4000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    return [json.loads(line.removeprefix("ANSWER ")) for line in lines]


@pytest.mark.usefixtures("no_servers")
def test_engines_of_one_model_share_the_pool_and_another_model_does_not(
    model: Path, tmp_path: Path, dice: random.Random
) -> None:
    script = tmp_path / "offline.py"
    script.write_text(SCRIPT)
    other = make_model(tmp_path / "other", "gqa", seed=1)
    prompt = [dice.randint(3, 1000) for _ in range(PROMPT_TOKENS)]
    restorable = (PROMPT_TOKENS - 1) // PAGE_SIZE * PAGE_SIZE
    pool = LocalPool()
    pool.start()
    try:
        stored_by, again = run_engine(script, model, prompt, pool)
        pages = pool.stored_pages()
        loaded, _ = run_engine(script, model, prompt, pool)
        foreign, _ = run_engine(script, other, prompt, pool)
        pages_of_both = pool.stored_pages()
    finally:
        pool.stop()
    assert stored_by["tiers"].get("storage", 0) == 0
    assert again["tiers"]["device"] == restorable
    assert pages == PROMPT_TOKENS // PAGE_SIZE
    assert loaded["tiers"]["storage"] == restorable
    assert loaded["ids"] == again["ids"] == stored_by["ids"]
    assert foreign["tiers"].get("storage", 0) == 0, "another model's pages were loaded"
    assert pages_of_both == 2 * pages
    assert foreign["ids"] != stored_by["ids"], "the models answer alike: this shows nothing"
