# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Options from text, files, mappings and variables: what is read, refused, told and hidden."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from pydantic import BaseModel

from ascend_direct.config import GIB, KIB, MIB, DirectConfig, option_names, parse_bytes
from ascend_direct.config_text import ENV_INTERNAL, ENV_PREFIX, variable
from ascend_direct.errors import ConfigError
from ascend_direct.store.memcache import MemcacheStore

HCOM_URL = "tcp://10.1.2.3:7000"
SECRETS = {
    "ca_path": "/secret/ca",
    "ca_crl_path": "/secret/crl",
    "cert_path": "/secret/cert",
    "key_path": "/secret/key",
    "key_pass_path": "/secret/pass",
    "package_path": "/secret/lib",
    "decrypter_path": "/secret/decrypter",
}


def load(source: Any = None, environ: Mapping[str, str] | None = None) -> DirectConfig:
    return DirectConfig.load(source, environ=environ or {})


def reasons(source: Any = None, environ: Mapping[str, str] | None = None) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load(source, environ)
    return caught.value.reasons


def sections(model: type[BaseModel] = DirectConfig) -> Iterator[type[BaseModel]]:
    yield model
    for option in model.model_fields.values():
        if isinstance(option.annotation, type) and issubclass(option.annotation, BaseModel):
            yield from sections(option.annotation)


def test_without_anything_the_defaults_are_taken() -> None:
    assert load() == load("{}") == load({}) == DirectConfig()


@pytest.mark.parametrize("form", ["text", "file", "mapping", "read-only mapping"])
def test_each_form_of_the_options_means_the_same(form: str, tmp_path: Path) -> None:
    options = {"store": "local", "local": {"size_bytes": "8MB"}, "provider": {"a": [1, None]}}
    file = tmp_path / "options.json"
    file.write_text(json.dumps(options))
    source = {
        "text": json.dumps(options),
        "file": f"@{file}",
        "mapping": options,
        "read-only mapping": MappingProxyType(options),
    }[form]
    config = load(source)
    assert config.store == "local"
    assert config.local.size_bytes == 8 * MIB
    assert config.provider == {"a": [1, None]}


def test_a_file_may_carry_a_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "options.json"
    file.write_text('{"store": "local"}', encoding="utf-8-sig")
    assert load(f"@{file}").store == "local"


def test_a_file_may_be_named_from_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "options.json").write_text('{"store": "local"}')
    assert load("@~/options.json").store == "local"


def test_the_environment_wins_option_by_option() -> None:
    source = {"store": "memcache", "memcache": {"hcom_url": "tcp://a:1", "world_size": 8}}
    config = load(source, {variable("memcache.hcom_url"): HCOM_URL})
    assert config.memcache.hcom_url == HCOM_URL
    assert config.memcache.world_size == 8
    assert config.store == "memcache"


def test_lists_and_objects_are_json_in_the_environment_too() -> None:
    config = load(
        None,
        {
            variable("memcache.preferred_members"): '["3", "4"]',
            variable("provider"): '{"bucket": "b"}',
        },
    )
    assert config.memcache.preferred_members == ("3", "4")
    assert config.provider == {"bucket": "b"}


def test_every_option_has_its_variable() -> None:
    names = list(option_names())
    assert len({variable(name) for name in names}) == len(names)
    for name in names:
        with pytest.raises(ConfigError) as caught:
            load(None, {variable(name): "\udcff"})
        assert caught.value.reasons == (f"{variable(name)} is not UTF-8 text: set it again.",)


def test_variables_of_others_and_internal_ones_are_left_alone() -> None:
    others = {"PATH": "/bin", "ASCEND_HOME_PATH": "/opt", "ascend_direct_store": "x"}
    assert load(None, others | dict.fromkeys(ENV_INTERNAL, "cli")) == DirectConfig()


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("512MB", 512 * MIB),
        ("4GB", 4 * GIB),
        ("4gb", 4 * GIB),
        ("4 G", 4 * GIB),
        (" 1TB ", GIB * KIB),
        ("1048576B", MIB),
        ("1048576", MIB),
        (1048576, MIB),
    ],
)
def test_sizes_are_read_as_memcache_reads_them(text: str | int, size_bytes: int) -> None:
    assert parse_bytes(text) == size_bytes
    assert load({"batch_bytes": text}).batch_bytes == size_bytes
    assert parse_bytes(
        load({"memcache": {"dram_size": text, "max_dram_size": "2TB"}}).memcache.dram_size
    )


@pytest.mark.parametrize("text", ["", "MB", "-1", "1.5GB", "1 PB", "0x10", "1e9", "4GB 2MB", True])
def test_what_is_no_size_is_refused_with_an_example(text: str | bool) -> None:
    (reason,) = reasons({"store_queue_bytes": text})
    assert reason.startswith("store_queue_bytes:")
    assert re.search("write for example 512MB|use a whole number", reason)


def test_all_mistakes_are_told_at_once() -> None:
    told = reasons(
        {
            "stroe": "local",
            "write_policy": "sometimes",
            "min_load_tokens": 0,
            "batch_bytes": "lots",
            "memcache": {"protocol": "ib", "hcom_ulr": "x", "meta_service_url": "h:1"},
            "local": {"path": "here", "size_bytes": "1KB"},
        },
        {
            variable("log_interval_s"): "often",
            ENV_PREFIX + "VERBOSE": "1",
            variable("memcache.world_size"): "0",
        },
    )
    starts = (
        *("unknown variable ASCEND_DIRECT_VERBOSE", "unknown option 'stroe'", "write_policy"),
        *("min_load_tokens", "batch_bytes", "memcache.protocol", "memcache.meta_service_url"),
        *("unknown option 'memcache.hcom_ulr'", "local.path", "local.size_bytes"),
        *("log_interval_s", "memcache.world_size"),
    )
    assert len(told) == len(starts)
    for start in starts:
        assert sum(reason.startswith(start) for reason in told) == 1, start


def test_a_text_that_cannot_be_read_does_not_hide_wrong_variables() -> None:
    first, second = reasons("{", {variable("log_interval_s"): "often"})
    assert "is not JSON" in first
    assert second.startswith("log_interval_s")


def test_an_option_in_the_wrong_place_is_shown_the_right_one() -> None:
    assert "did you mean 'memcache.dram_size'?" in reasons({"dram_size": "1GB"})[0]
    assert "did you mean 'local.path'?" in reasons({"path": "/p"})[0]


def test_an_object_is_changed_by_nobody_later() -> None:
    config = load()
    with pytest.raises(ValueError, match="frozen"):
        config.store = "local"  # type: ignore[misc]


def test_what_goes_to_a_child_process_makes_the_same_configuration() -> None:
    tls = {variable(f"memcache.tls.{name}"): path for name, path in SECRETS.items()}
    tls[variable("memcache.tls.enabled")] = "true"
    config = load({"store": "local", "memcache": {"dram_size": "2GB", "world_size": 8}}, tls)
    assert load(json.loads(config.describe()), config.secret_environment()) == config


@pytest.mark.parametrize(("mode", "told"), [(0o600, False), (0o644, False), (0o664, True)])
def test_a_file_that_others_may_write_is_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: int, told: bool
) -> None:
    file = tmp_path / "options.json"
    file.write_text('{"store": "local"}')
    file.chmod(mode)
    with caplog.at_level(logging.WARNING):
        assert load(f"@{file}").store == "local"
    assert ("has mode 664: whoever may write it" in caplog.text) is told


def test_tls_is_in_no_log_line_and_in_no_message_of_a_server(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What a server logs of its configuration, and what its store says of broken TLS files."""
    config = load({"store": "memcache", "memcache": {"tls": {"enabled": True, **SECRETS}}})
    with caplog.at_level(logging.DEBUG):
        said = [*MemcacheStore(config.memcache).problems(), config.describe()]
        logging.getLogger("test").info("%s %r %s", config.public_dict(), config, said)
    assert [reason for reason in said if "memcache.tls.key_path is not a file" in reason]
    assert "/secret" not in caplog.text + "".join(said) + str(config.memcache.tls)


def test_tls_is_described_nowhere() -> None:
    config = load({"memcache": {"tls": {"enabled": True, **SECRETS}, "world_size": 8}})
    for text in (config.describe(), json.dumps(config.public_dict())):
        assert "/secret" not in text
        assert "tls" not in text
        assert "world_size" in text
    assert set(config.secret_environment().values()) == {"True", *SECRETS.values()}


@pytest.mark.parametrize(
    "tls",
    [
        {"enabled": "/secret"},
        {"ca_path": 7, "key_path": ["/secret"]},
        {"enabled": True, "key_path": "/secret"},
        "/secret",
    ],
)
def test_a_mistake_in_the_tls_section_does_not_tell_its_values(tls: Any) -> None:
    for reason in reasons({"memcache": {"tls": tls}}):
        assert reason.startswith("memcache.tls")
        assert "/secret" not in reason


def test_every_option_has_a_description_that_is_a_sentence() -> None:
    for model in sections():
        for name, option in model.model_fields.items():
            assert option.description, f"{model.__name__}.{name}"
            assert option.description.endswith("."), f"{model.__name__}.{name}"
