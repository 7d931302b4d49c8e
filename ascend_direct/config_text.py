# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""From what an operator wrote to plain data, and from what is wrong with it to sentences.

Owns JSON, ``@file`` and the ASCEND_DIRECT_* variables, which are read nowhere else. Does not know
the options: their names come in as dotted text (config has them).
"""

from __future__ import annotations

import difflib
import json
import logging
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ascend_direct.names import ACTIVE_ENV, CONFIG_FLAG

_log = logging.getLogger(__name__)

ENV_PREFIX = "ASCEND_DIRECT_"
# Not options: set by the plugin itself for the processes it starts.
ENV_INTERNAL = frozenset({ACTIVE_ENV})
# Options that are no single value are JSON in the environment too.
_JSON_OPTIONS = frozenset({"memcache.preferred_members", "provider"})
_LONGEST_SHOWN = 60

# What to do about pydantic's kinds of error.
_ADVICE = {
    "bool_parsing": "use true or false",
    "bool_type": "use true or false",
    "dict_type": "use a JSON object",
    "greater_than_equal": "use {ge} or more",
    "int_from_float": "use a whole number",
    "int_parsing": "use a whole number",
    "int_parsing_size": "use a smaller number",
    "int_type": "use a whole number",
    "less_than_equal": "use {le} or less",
    "literal_error": "use {expected}",
    "model_type": "use a JSON object",
    "string_type": "use text",
    "tuple_type": "use a JSON list",
}


def variable(option: str) -> str:
    """Name of the environment variable of an option: ASCEND_DIRECT_MEMCACHE__HCOM_URL."""
    return ENV_PREFIX + option.upper().replace(".", "__")


def read(source: Any, reasons: list[str]) -> dict[str, Any]:
    """The options in JSON text, ``@file`` or a mapping; what is wrong is added to `reasons`."""
    if source is None:
        return {}
    where = CONFIG_FLAG
    try:
        if isinstance(source, str) and source.startswith("@"):
            where = source[1:]
            source = _read_file(Path(where).expanduser())
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: nobody's home directory
        reasons.append(f"cannot read the file {where!r} ({error}); use @/path/to/file.json.")
        return {}
    try:
        if not isinstance(source, str):  # from Engine: the same rules as for text
            source = json.dumps(dict(source) if isinstance(source, Mapping) else source)
        data = _parsed(source)
    except (TypeError, ValueError, RecursionError) as error:
        reasons.append(f"{where} is not JSON ({error}); use an object or @/path/to/file.json.")
        return {}
    if not isinstance(data, dict):
        reasons.append(f'{where} is not a JSON object; use one such as {{"store": "memcache"}}.')
        return {}
    return data


def _read_file(path: Path) -> str:
    """The text of a configuration file; says when others than its owner may change it."""
    with path.open(encoding="utf-8-sig") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        text = file.read()
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        _log.warning(
            "%s has mode %03o: whoever may write it decides where KV goes (chmod go-w)", path, mode
        )
    return text


def _parsed(text: str) -> Any:
    """JSON read strictly: no name twice, no NaN, nothing that UTF-8 cannot hold.

    Raises:
        ValueError, RecursionError: what is wrong.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{', '.join(map(repr, twice))} is given twice")
        return dict(pairs)

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no JSON number")

    data = json.loads(text, object_pairs_hook=once, parse_constant=refuse)
    json.dumps(data, ensure_ascii=False).encode()
    return data


def read_environment(
    environ: Mapping[str, str], options: Sequence[str], reasons: list[str]
) -> dict[str, Any]:
    """The options that variables set; what is wrong is added to `reasons`."""
    known = {variable(option): option for option in options}
    overlay: dict[str, Any] = {}
    for name, text in sorted(environ.items()):
        if not name.startswith(ENV_PREFIX) or name in ENV_INTERNAL:
            continue
        if name not in known:
            # Compared without what all have in common, or each would look like any other.
            option = name.removeprefix(ENV_PREFIX).lower().replace("__", ".")
            reasons.append(f"unknown variable {name}: unset it{_suggestion(option, options)}")
        elif text.encode(errors="ignore").decode() != text:
            reasons.append(f"{name} is not UTF-8 text: set it again.")
        else:
            *sections, last = known[name].split(".")
            target = overlay
            for section in sections:
                target = target.setdefault(section, {})
            target[last] = _value(known[name], text)
    return overlay


def _value(option: str, text: str) -> Any:
    if option in _JSON_OPTIONS:
        try:
            return _parsed(text)
        except (ValueError, RecursionError):
            return text  # the check of the option says what it wants
    return text


def merged(base: Mapping[str, Any], overlay: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `overlay`, section by section.

    What stands in place of a section in `base` stays: a mistake to be told, not to be covered.
    """
    result = dict(base)
    for name, value in overlay.items():
        below = result.get(name, {})
        if isinstance(value, dict):
            value = merged(below, value) if isinstance(below, dict) else below
        result[name] = value
    return result


def sentences(error: ValidationError, options: Sequence[str]) -> Iterator[str]:
    """Each mistake that pydantic found: which option, its value, what to do."""
    for item in error.errors(include_url=False):
        where = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            yield f"unknown option {where!r}: drop it{_suggestion(where, options)}"
        elif item["type"] in _ADVICE:
            advice = _ADVICE[item["type"]].format(**item.get("ctx", {}))
            yield f"{where}{_shown(where, item['input'])}: {advice}."
        else:
            yield f"{where}: {item['msg'].removeprefix('Value error, ')}."


def _shown(where: str, value: Any) -> str:
    """A short value; never one that tells where keys lie."""
    if where.startswith("memcache.tls") or isinstance(value, (dict, list)):
        return ""
    text = json.dumps(value, default=repr)
    return f" is {text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + ' ...'}"


def _suggestion(name: str, known: Sequence[str]) -> str:
    same = [full for full in known if full.endswith(f".{name}")]
    close = same or difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else "; docs/configuration.md lists them all."
