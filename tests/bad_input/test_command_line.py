# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Mistakes at a real `python -m sglang.launch_server`: what is read, and that nothing is left."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from sglang_cpu.process_tree import ProcessTree
from sglang_cpu.server import LAUNCHER, cpu_environment

from ascend_direct.names import CONFIG_FLAG, FLAG

from ..integration.launching import command_line, model_path

START_S = 180.0  # imports of torch and SGLang while other servers keep the cores busy
SECRET = "/secret/place/of/a/key.pem"


@dataclass(frozen=True)
class Start:
    """A start that must not succeed: what is added to the command line, and what must be read."""

    said: tuple[str, ...]
    args: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    exit_code: int = 1


def _options(**options: object) -> tuple[str, ...]:
    return (FLAG, CONFIG_FLAG, json.dumps({"store": "local", "model_id": "tiny", **options}))


STARTS = {
    "several mistakes": Start(
        (
            f"{FLAG} cannot start:",
            "  * unknown variable ASCEND_DIRECT_VERBOSE: unset it",
            "  * unknown option 'stroe': drop it; did you mean 'store'?",
            "  * the radix cache is off: drop --disable-radix-cache",
        ),
        (*_options(stroe="local"), "--disable-radix-cache"),
        (("ASCEND_DIRECT_VERBOSE", "1"),),
    ),
    "options without the flag": Start((f"is given without {FLAG}; add",), (CONFIG_FLAG, "{}")),
    "a missing file": Start(
        ("  * cannot read the file '/no/such.json'",), (FLAG, CONFIG_FLAG, "@/no/such.json")
    ),
    "an unreachable pool": Start(
        ("nobody listens at tcp://127.0.0.1:1", "start the MetaService of the pool"),
        _options(store="memcache", memcache={"meta_service_url": "tcp://127.0.0.1:1"}),
    ),
    "an unknown store": Start(("  * store 'redis' is not installed",), _options(store="redis")),
    "a key that is not there": Start(
        ("  * memcache.tls.key_path is not a file",),
        _options(store="memcache"),
        (
            ("ASCEND_DIRECT_MEMCACHE__TLS__ENABLED", "1"),
            *((f"ASCEND_DIRECT_MEMCACHE__TLS__{n}_PATH", SECRET) for n in ("CA", "CERT", "KEY")),
        ),
    ),
    "the flag where the plugin may not load": Start(
        (f"unrecognized arguments: {FLAG}",),
        (FLAG,),
        (("SGLANG_PLUGINS", "another"),),
        exit_code=2,
    ),
}


@dataclass
class Ended:
    """How a start ended."""

    code: int
    stdout: str
    stderr: str
    left: list[int]


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Ended]]:
    """All the starts, made side by side since each imports for long."""
    folder: Path = tmp_path_factory.mktemp("command_line")
    model = Path(model_path())
    with ExitStack() as files:
        running = {}
        for number, (name, start) in enumerate(STARTS.items()):
            out, err = (
                files.enter_context((folder / f"{number}.{stream}").open("w+"))
                for stream in ("out", "err")
            )
            process = subprocess.Popen(
                [*LAUNCHER, *command_line("--port", "1", *start.args)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=cpu_environment(model, 1, dict(start.env)),
                start_new_session=True,
            )
            running[name] = (process, ProcessTree(process.pid), out, err)
        try:
            yield {name: _end(*parts) for name, parts in running.items()}
        finally:
            for process, tree, *_ in running.values():
                tree.kill()
                process.wait()


def _end(process: subprocess.Popen[bytes], tree: ProcessTree, *streams) -> Ended:
    tree.processes()
    code = process.wait(START_S)
    left = [survivor.pid for survivor in tree.processes()]
    for stream in streams:
        stream.seek(0)
    return Ended(code, *(stream.read() for stream in streams), left)


@pytest.mark.parametrize("name", STARTS)
def test_the_command_ends_with_the_reasons_and_nothing_else(
    name: str, ended: dict[str, Ended]
) -> None:
    start, end = STARTS[name], ended[name]
    print(end.stderr)
    assert end.code == start.exit_code
    assert end.left == []
    for text in start.said:
        assert end.stderr.count(text) == 1
    assert "Traceback" not in end.stderr + end.stdout
    assert SECRET not in end.stderr + end.stdout
