# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Whatever an operator writes is a configuration or a list of reasons, within bounded time."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ascend_direct.config import DirectConfig, option_names
from ascend_direct.config_text import ENV_PREFIX, variable
from ascend_direct.errors import ConfigError
from tests.fuzz.budget import FUZZ

# Of which a config error takes milliseconds; a busy machine may take longer.
LONGEST_S = 5.0

# Any JSON, mixed with the names and values of real options so that checks are reached.
_NAMES = sorted({part for name in option_names() for part in name.split(".")})
_URL = "tcp://10.1.2.3:7000"
_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["4GB", "٣GB", "local", "degrade", "device_sdma", _URL, "/p", "~nobody/p"])
    | st.sampled_from(["\ud800", "tcp://h:٣", "9" * 5000, "x" * 100_000, "@/dev/zero/x"])
)
_KEYS = st.sampled_from(_NAMES) | st.text(max_size=8) | st.just("x" * 100_000)
_JSON = st.recursive(
    _SCALARS,
    lambda below: st.lists(below, max_size=3) | st.dictionaries(_KEYS, below, max_size=6),
    max_leaves=12,
)
# What a YAML file may hold beyond JSON, as SGLang's --config hands it on.
_YAML = st.recursive(
    _SCALARS | st.dates() | st.binary(max_size=4) | st.frozensets(st.integers(), max_size=2),
    lambda below: (
        st.lists(below, max_size=3)
        | st.dictionaries(_KEYS | st.integers() | st.none() | st.dates(), below, max_size=6)
    ),
    max_leaves=12,
)
_VARIABLES = st.sampled_from([variable(name) for name in option_names()])
_ENVIRONMENT = st.dictionaries(
    _VARIABLES | st.text(max_size=8).map(ENV_PREFIX.__add__),
    st.text(max_size=12) | _JSON.map(json.dumps),
    max_size=4,
)


def _loads_or_says_why(source: Any, environ: Mapping[str, str]) -> None:
    begin_s = time.monotonic()
    config, reasons = None, ()
    try:
        config = DirectConfig.load(source, environ)
    except ConfigError as error:
        reasons = error.reasons
    assert time.monotonic() - begin_s < LONGEST_S
    if config is None:
        assert reasons
        assert all(reason.strip() for reason in reasons)
    else:
        again = DirectConfig.load(json.loads(config.describe()), config.secret_environment())
        assert again == config


@given(_JSON, _ENVIRONMENT)
@FUZZ
def test_any_json_and_any_variables_are_taken_or_refused_with_reasons(
    data: Any, environ: dict[str, str]
) -> None:
    _loads_or_says_why(json.dumps(data), environ)


@given(_YAML)
@FUZZ
def test_any_object_from_yaml_or_python_is_taken_or_refused_with_reasons(data: Any) -> None:
    _loads_or_says_why(data, {})


@given(st.text() | st.text().map("@".__add__))
@FUZZ
def test_any_text_is_taken_or_refused_with_reasons(text: str) -> None:
    _loads_or_says_why(text, {})


@given(st.binary(max_size=64))
@FUZZ
def test_any_file_is_taken_or_refused_with_reasons(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "options.json"
    file.write_bytes(content)
    _loads_or_says_why(f"@{file}", {})


def _endless() -> dict[str, Any]:
    loop: dict[str, Any] = {}
    loop["provider"] = loop
    return loop


@pytest.mark.parametrize(
    "source",
    [
        "[" * 1_000_000,
        '{"a":' * 100_000,
        json.dumps({f"x{i}" * 50: 1 for i in range(2000)}),
        json.dumps({"provider": "y" * 5_000_000}),
        json.dumps({"z" * 1_000_000: 1}),
        '{"batch_bytes": ' + "9" * 1_000_000 + "}",
        {date(2024, 1, 1): 1},
        _endless(),
    ],
    ids=["brackets", "objects", "unknown", "long", "long name", "digits", "dates", "endless"],
)
def test_what_is_huge_or_endless_is_refused_in_bounded_time(source: Any) -> None:
    _loads_or_says_why(source, {})
