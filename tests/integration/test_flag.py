# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""The flag: each way to give it, what crosses to a child process, and nothing at all without it."""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from sglang_cpu.server import LAUNCHER, cpu_environment

import ascend_direct
from ascend_direct.config import DirectConfig
from ascend_direct.errors import ConfigError
from ascend_direct.names import ACTIVE_ENV, BACKEND, CONFIG_FLAG, FLAG, LINKER_CLASS, LINKER_MODULE

from .launching import command_line, load_plugin, model_path, resolved

START_S = 180.0  # imports of torch and SGLang while other servers keep the cores busy
SECRET = "/secret/place"
TLS = {"enabled": True, "ca_path": f"{SECRET}/ca", "cert_path": f"{SECRET}/c"}
TLS_KEY = {"key_path": f"{SECRET}/key"}


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    """SGLang and the plugin set variables for their children; SGLang replaces log handlers."""
    root = logging.getLogger()
    environment, handlers, level = dict(os.environ), list(root.handlers), root.level
    yield
    os.environ.clear()
    os.environ.update(environment)
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    """Options that differ from the defaults and work on any machine."""
    return {
        "store": "local",
        "local": {"path": str(tmp_path / "pages"), "size_bytes": 4 << 20},
        "model_id": "tiny",
        "min_load_tokens": 7,
    }


def handed(args: Any) -> dict[str, Any]:
    """What a scheduler process is handed, checked to be ours."""
    from sglang.srt.arg_groups.overrides import resolving_view

    view = resolving_view(args)
    linker = view.unified_cache_external_linker_config
    assert view.radix_cache_backend == BACKEND
    assert view.enable_unified_cache_external_linker
    assert view.unified_cache_external_linker_backend == "dynamic"
    assert (linker["linker_module_path"], linker["linker"]) == (LINKER_MODULE, LINKER_CLASS)
    return linker["linker_extra_config"]


def run(script: str, *args: str, env: Mapping[str, str] | None = None) -> str:
    """Standard output of a fresh interpreter that runs `script`."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *args],
        env=cpu_environment(Path(model_path()), 1, env or {}),
        capture_output=True,
        text=True,
        timeout=START_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- ways to give it ----------------------------------------------------------------------------


def test_the_command_line_hands_the_options_to_the_schedulers(options) -> None:
    extra = handed(resolved(command_line(FLAG, CONFIG_FLAG, json.dumps(options))))
    assert extra["config"] == options
    assert extra["model"]["model"] == "id:tiny"


@pytest.mark.parametrize("form", ["text", "file", "mapping"])
def test_the_yaml_file_of_sglang_takes_the_flag(form: str, options, tmp_path: Path) -> None:
    (tmp_path / "options.json").write_text(json.dumps(options))
    value = {
        "text": f"'{json.dumps(options)}'",
        "file": f"'@{tmp_path}/options.json'",
        "mapping": json.dumps(options),  # JSON is YAML
    }[form]
    yaml = tmp_path / "server.yaml"
    yaml.write_text(f"{FLAG[2:]}: true\n{CONFIG_FLAG[2:]}: {value}\n")
    assert handed(resolved(command_line("--config", str(yaml))))["config"] == options


def test_the_yaml_file_may_switch_it_off(tmp_path: Path) -> None:
    yaml = tmp_path / "server.yaml"
    yaml.write_text(f"{FLAG[2:]}: false\n")
    assert resolved(command_line("--config", str(yaml))).radix_cache_backend is None
    assert ACTIVE_ENV not in os.environ


def test_the_order_of_the_arguments_does_not_matter(options) -> None:
    text = json.dumps(options)
    pairs = [[FLAG], [f"{CONFIG_FLAG}={text}"], ["--page-size", "16"], ["--device", "cpu"]]
    pairs += [["--model-path", model_path()], ["--attention-backend", "torch_native"]]
    shuffle = random.Random(1)
    for _ in range(6):
        shuffle.shuffle(pairs)
        assert handed(resolved([word for pair in pairs for word in pair]))["config"] == options


def test_without_options_the_environment_is_enough(options) -> None:
    os.environ["ASCEND_DIRECT_STORE"] = "local"
    os.environ["ASCEND_DIRECT_LOCAL__PATH"] = options["local"]["path"]
    os.environ["ASCEND_DIRECT_LOCAL__SIZE_BYTES"] = "4MB"
    os.environ["ASCEND_DIRECT_MODEL_ID"] = "tiny"
    extra = handed(resolved(command_line(FLAG)))
    assert extra["config"] == {k: v for k, v in options.items() if k != "min_load_tokens"}


@pytest.mark.parametrize("form", ["mapping", "text", "file"])
def test_the_engine_takes_the_options_as_arguments(form: str, options, tmp_path: Path) -> None:
    (tmp_path / "options.json").write_text(json.dumps(options))
    source = {
        "mapping": options,
        "text": json.dumps(options),
        "file": f"@{tmp_path}/options.json",
    }[form]
    extra = handed(engine(ascend_direct.engine_args(source)))
    assert extra["config"] == options
    assert os.environ[ACTIVE_ENV] == "engine"


def test_the_engine_is_told_by_an_exception(options) -> None:
    with pytest.raises(ConfigError, match="'stroe': drop it; did you mean 'store'") as caught:
        engine(ascend_direct.engine_args({**options, "stroe": 1}), disable_radix_cache=True)
    assert len(caught.value.reasons) == 2


def engine(ours: Mapping[str, Any], **more: Any) -> Any:
    """Arguments of `sglang.Engine(...)`, resolved as it does."""
    load_plugin()
    from sglang.srt.server_args import ServerArgs

    base = {"device": "cpu", "attention_backend": "torch_native", "page_size": 16}
    args = ServerArgs(model_path=model_path(), **base, **ours, **more)
    args.resolve_once()
    return args


def test_the_help_names_both_options() -> None:
    done = subprocess.run(
        [*LAUNCHER, "--help"],
        env=cpu_environment(Path(model_path()), 1, {}),
        capture_output=True,
        text=True,
        timeout=START_S,
        check=True,
    )
    for text in (FLAG, f"{CONFIG_FLAG} JSON|@FILE", "docs/configuration.md"):
        assert text in done.stdout


# ---- what crosses to a child --------------------------------------------------------------------

# As a scheduler process: the plugin, then the arguments.
CHILD = """
import json, pickle, sys
from sglang.srt.plugins import load_plugins
load_plugins()
with open(sys.argv[1], "rb") as file:
    args = pickle.load(file)
from sglang.srt.arg_groups.overrides import resolving_view
from sglang.srt.mem_cache.registry import get_radix_cache_factory
from ascend_direct.config import DirectConfig
view = resolving_view(args)
config = DirectConfig.load(
    view.unified_cache_external_linker_config["linker_extra_config"]["config"]
)
print(json.dumps({
    "config": config.model_dump(mode="json"),
    "backend": view.radix_cache_backend,
    "factory": get_radix_cache_factory(view.radix_cache_backend) is not None,
}))
"""


def test_a_child_gets_all_options_and_keys_are_told_nowhere(options, tmp_path: Path) -> None:
    load_plugin()
    from sglang.srt.server_args import prepare_server_args

    file = tmp_path / "options.json"
    file.write_text(json.dumps({**options, "memcache": {"world_size": 8, "tls": TLS}}))
    os.environ["ASCEND_DIRECT_MEMCACHE__TLS__KEY_PATH"] = TLS_KEY["key_path"]
    log = io.StringIO()
    args = prepare_server_args(command_line(FLAG, CONFIG_FLAG, f"@{file}", "--log-level", "debug"))
    logging.getLogger().addHandler(logging.StreamHandler(log))
    args.resolve_once()
    logging.getLogger().info("server_args=%s", args.resolved_dict())

    pickled = tmp_path / "args.pickle"
    pickled.write_bytes(pickle.dumps(args))
    for text in (repr(args), log.getvalue(), args.launch_command, repr(vars(args))):
        assert SECRET not in text
    assert SECRET.encode() not in pickled.read_bytes()

    told = json.loads(run(CHILD, str(pickled)))
    assert told["backend"] == BACKEND
    assert told["factory"]
    expected = DirectConfig.load({**options, "memcache": {"world_size": 8, "tls": TLS | TLS_KEY}})
    assert told["config"] == expected.model_dump(mode="json")


# ---- without it ---------------------------------------------------------------------------------

# As `sglang.launch_server` begins; tells what the plugins changed.
PLAIN = """
import json, logging, os, sys

class Records(logging.Handler):
    def emit(self, record):
        records.append([record.name, record.levelname, record.getMessage()])

records = []
logging.getLogger().addHandler(Records())
logging.getLogger().setLevel(logging.DEBUG)
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import prepare_server_args
before, environment = set(sys.modules), dict(os.environ)
load_plugins()
loaded = sorted(set(sys.modules) - before)
changed = dict(os.environ) != environment
args = prepare_server_args(sys.argv[1:])
logging.getLogger().addHandler(Records())
args.resolve_once()
args.check_server_args()
print(json.dumps({
    "loaded": loaded,
    "environment changed": changed,
    "ours": sorted(name for name in sys.modules if name.startswith("ascend_direct")),
    "records": records,
    "resolved": json.loads(json.dumps(args.resolved_dict(), default=str, sort_keys=True)),
    "environment": {k: v for k, v in os.environ.items() if k != "SGLANG_PLUGINS"},
}))
"""


@pytest.fixture(scope="module")
def plain() -> tuple[dict[str, Any], dict[str, Any]]:
    """A launch without the flag: with the plugin, and without any plugin."""
    arguments = command_line("--random-seed", "1", "--port", "30000")
    return _plain("ascend_direct", arguments), _plain("none-of-these", arguments)


def _plain(plugins: str, arguments: Sequence[str]) -> dict[str, Any]:
    out = run(PLAIN, *arguments, env={"SGLANG_PLUGINS": plugins})
    return json.loads(out.splitlines()[-1])


def test_without_the_flag_the_plugin_imports_itself_and_nothing_else(plain) -> None:
    ours, none = plain
    assert set(ours["loaded"]) - set(none["loaded"]) <= {
        *("ascend_direct", "ascend_direct.names", "ascend_direct.plugin"),
        "sglang.srt.arg_groups.resolution_hooks",
    }
    assert ours["ours"] == ["ascend_direct", "ascend_direct.names", "ascend_direct.plugin"]
    assert none["ours"] == []


def test_without_the_flag_nothing_is_logged_by_the_plugin(plain) -> None:
    ours, none = plain
    assert [record for record in ours["records"] if record[0].startswith("ascend_direct")] == []
    loud = [
        [record for record in run["records"] if record[1] not in ("DEBUG", "INFO")]
        for run in (ours, none)
    ]
    assert loud[0] == loud[1]


def test_without_the_flag_the_server_is_configured_as_without_the_plugin(plain) -> None:
    ours, none = plain
    assert ours["resolved"] == none["resolved"]
    assert ours["environment"] == none["environment"]
    assert not ours["environment changed"]


def test_the_package_imports_only_the_standard_library() -> None:
    script = (
        "import sys; before = set(sys.modules); import ascend_direct.plugin;"
        "print(sorted({m.partition('.')[0] for m in set(sys.modules) - before}"
        " - sys.stdlib_module_names))"
    )
    assert run(script).strip() == "['ascend_direct']"
