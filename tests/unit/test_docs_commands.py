# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Each command that a document shows exists, with its options, and a test runs it or it needs NPUs.

Owns the table of who runs what. Whether the figures in the documents are right, it cannot know.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer

from ascend_direct import names
from ascend_direct.cli.main import app

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
NEEDS_NPU = "# needs an NPU"
# Which test runs a command, with what must be in it. The longest name that fits counts.
RUN_BY = {
    "ascend-direct doctor": ("tests/contract/test_doctor.py", '"doctor"'),
    "ascend-direct meta": ("tests/contract/test_meta.py", '"meta"'),
    "ascend-direct plan": ("tests/unit/test_cli_plan.py", '"plan"'),
    "ascend-direct pool bench": ("tests/contract/test_pool_stats.py", '"bench"'),
    "ascend-direct pool clear": ("tests/unit/test_cli_pool_clear.py", '"pool", "clear"'),
    "ascend-direct pool ls": ("tests/contract/test_pool_stats.py", '"ls"'),
    "ascend-direct pool member": ("tests/contract/memcache_processes.py", '"pool", "member"'),
    "ascend-direct pool stats": ("tests/contract/test_pool_stats.py", '"stats"'),
    "ascend-direct version": ("tests/unit/test_cli.py", '"version"'),
    "scripts/accuracy/gsm8k": ("tests/accuracy/test_gsm8k.py", "gsm8k.run"),
    "scripts/accuracy/repeat": ("tests/e2e/test_repeat_accuracy.py", "Repeat(prompts"),
    "scripts/bench/gaps": ("tests/bench/test_gaps.py", "gaps.main"),
    "scripts/bench/serve": ("tests/bench/test_serve.py", "serve.main"),
    "scripts/bench/transfer": ("tests/bench/test_transfer.py", "transfer.main"),
    "scripts/bench/verify_cost": ("tests/bench/test_verify_cost.py", '"bench.verify_cost"'),
    "scripts/chaos": ("tests/chaos/test_chaos.py", "scripts/chaos"),
    "scripts/check": ("scripts/test", "scripts/check"),
    "scripts/demo": ("tests/e2e/test_demo.py", '"two_instances"'),
    "scripts/demo --pd": ("tests/e2e/test_demo.py", '"prefill_decode"'),
    "scripts/npu_smoke": ("tests/npu/test_smoke_logic.py", '"smoke", "--emulated"'),
    "scripts/plan_check": ("tests/bench/test_plan_check.py", "plan_check.main"),
    "scripts/test": (".ci/run", "scripts/test"),
}


class Shown(NamedTuple):
    """A command line of a document."""

    document: str
    line: str

    def __str__(self) -> str:
        return f"{self.document}: {self.line}"


def _lines(text: str) -> Iterator[str]:
    """Of shell blocks, continued lines joined, and of code within sentences."""
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield from block.replace("\\\n", " ").splitlines()
    yield from re.findall(r"`((?:ascend-direct|scripts/)[^`]*)`", re.sub(r"```.*?```", "", text))


def _shown() -> list[Shown]:
    found = [
        Shown(path.name, " ".join(line.split()))
        for path in DOCUMENTS
        for line in _lines(path.read_text(encoding="utf-8"))
    ]
    return sorted(set(found))


ALL = _shown()
OURS = [s for s in ALL if re.match(r"ascend-direct [a-z]|scripts/[a-z_/]+( |$)", s.line)]


def _words(line: str) -> list[str]:
    return shlex.split(line.split(" # ")[0].rstrip("& ").replace("…", "X"), comments=False)


@functools.cache
def _help(script: str) -> str:
    done = subprocess.run(
        [ROOT / script, "--help"],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, f"{script} --help: {done.stderr}"
    return done.stdout


def _options_of(words: list[str]) -> tuple[set[str], str]:
    """Options that the command knows, and its name."""
    if words[0] != "ascend-direct":
        return set(re.findall(r"--[a-z][a-z0-9-]*", _help(words[0]))), words[0]
    command: Any = typer.main.get_command(app)
    depth = 1
    while hasattr(command, "commands"):
        assert words[depth : depth + 1], f"{' '.join(words)} names no subcommand"
        name = words[depth]
        assert name in command.commands, f"{' '.join(words[:depth])} has no {name}"
        command, depth = command.commands[name], depth + 1
    return {o for p in command.params for o in p.opts}, " ".join(words[:depth])


def _runner(name: str, words: list[str]) -> tuple[str, str] | None:
    known = [k for k in RUN_BY if " ".join([name, *words]).startswith(k) and k.startswith(name)]
    return RUN_BY[max(known, key=len)] if known else None


def _is_program(shown: Shown) -> bool:
    first = shown.line.split()[0]
    return first == "ascend-direct" or ((ROOT / first).is_file() and (ROOT / first).suffix == "")


PROGRAMS = [shown for shown in OURS if _is_program(shown)]


@pytest.mark.parametrize("shown", PROGRAMS, ids=str)
def test_a_command_exists_with_its_options(shown: Shown) -> None:
    words = _words(shown.line)
    given = {word.split("=")[0] for word in words[1:] if word.startswith("--")}
    if words[0] == "scripts/test":  # passes what it is given to pytest
        assert given <= {"--require"}
        return
    known, _ = _options_of(words) if given or words[0] == "ascend-direct" else (set[str](), "")
    assert given <= known | {"--help"}, f"no option {given - known}"


@pytest.mark.parametrize("shown", PROGRAMS, ids=str)
def test_a_command_is_run_by_a_test_or_marked_as_needing_an_npu(shown: Shown) -> None:
    if NEEDS_NPU in shown.line:
        return
    words = _words(shown.line)
    name = _options_of(words)[1] if words[0] == "ascend-direct" else words[0]
    found = _runner(name, [w for w in words if w.startswith("--")])
    assert found, f"no test runs {name}: add one to RUN_BY, or mark it with {NEEDS_NPU!r}"
    path, mark = found
    assert mark in (ROOT / path).read_text(encoding="utf-8"), f"{path} does not run {name}"


@pytest.mark.parametrize("shown", [s for s in ALL if "scripts/" in s.line.split()[0]], ids=str)
def test_a_script_that_is_named_is_there(shown: Shown) -> None:
    assert (ROOT / shown.line.split()[0].rstrip(":,")).exists()


@pytest.mark.sglang
def test_servers_of_the_documents_have_options_that_they_know() -> None:
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    known = {*parser._option_string_actions, names.FLAG, names.CONFIG_FLAG}
    launched = [shown for shown in ALL if "sglang.launch_server" in shown.line]
    assert launched
    for shown in launched:
        for word in re.findall(r"--[a-z][a-z-]*", shown.line):
            assert word in known, f"{shown}: {word}"
