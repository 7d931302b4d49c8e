# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Writes docs/configuration.md from ascend_direct/config.py: `python scripts/options_doc.py`.

Owns the page's form; what an option means is said where it is declared. A test holds the page equal
to what this makes.
"""

from __future__ import annotations

import json
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ascend_direct.config import Bytes, DirectConfig, Size, parse_bytes
from ascend_direct.config_text import variable

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"
HEAD = """\
# Options

Made by `python scripts/options_doc.py` from `ascend_direct/config.py`; do not edit.

The options are one JSON object behind `--hierarchical-cache-direct-config`, as text or as
`@/path/to/file.json`; a section of it is an object too. Each option can also be set by a variable,
for what differs by host; the variable wins, and holds JSON where the option is a list or an object.
In SGLang's YAML `--config` the object is a mapping under `hierarchical-cache-direct-config`, beside
`enable-hierarchical-cache-direct: true`. With `sglang.Engine`:
`Engine(..., **ascend_direct.engine_args({"store": "memcache"}))`.

```
python -m sglang.launch_server --model-path ... --enable-hierarchical-cache-direct \\
  --hierarchical-cache-direct-config '{"store": "memcache", "memcache": {"protocol": "host_tcp"}}'
```

Names end in their unit. A size is a number of bytes or a text such as `"512MB"` or `"4GB"` (powers
of 1024). Every mistake is printed at the start of the server, all at once, and ends it.
`memcache.tls` is refused on the command line and in `engine_args`, because SGLang logs its
arguments: use a file or the variables.
"""


def page() -> str:
    """The page, as it should be."""
    sections = [HEAD, *_section(DirectConfig, "")]
    return "\n".join(sections)


def _section(model: type[BaseModel], prefix: str) -> Iterator[str]:
    rows, below = [], []
    for name, option in model.model_fields.items():
        kind = option.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            below += [*_section(kind, f"{prefix}{name}.")]
        else:
            rows.append(_row(f"{prefix}{name}", option))
    title = f"## Section `{prefix[:-1]}`" if prefix else "## General"
    yield (
        "\n".join(
            [
                title,
                "",
                "| option | type | default | meaning | variable |",
                "|---|---|---|---|---|",
                *rows,
            ]
        )
        + "\n"
    )
    yield from below


def _row(name: str, option: FieldInfo) -> str:
    cells = (
        f"`{name}`",
        _kind(option),
        f"`{json.dumps(_default(option))}`",
        option.description or "",
        f"`{variable(name)}`",
    )
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


def _default(option: FieldInfo) -> Any:
    value = option.get_default(call_default_factory=True)
    if _is(option, Bytes):
        unit = next(unit for unit in ("TB", "GB", "MB") if value % parse_bytes(f"1{unit}") == 0)
        return f"{value // parse_bytes(f'1{unit}')}{unit}"
    return value


def _kind(option: FieldInfo) -> str:
    """How the type reads to an operator."""
    kind = option.annotation
    if typing.get_origin(kind) is typing.Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(kind))
    if _is(option, Bytes) or _is(option, Size):
        return "size"
    bounds = {type(rule).__name__: rule for rule in option.metadata}
    low, high = (getattr(bounds.get(name), name.lower(), None) for name in ("Ge", "Le"))
    names = {bool: "true or false", int: "whole number", str: "text", dict: "object"}
    origin = typing.get_origin(kind) or kind
    text = names.get(origin, "list of texts" if origin is tuple else str(kind))
    if high is not None:
        return f"{text}, {low} to {high}"
    return f"{text}, {low} or more" if low is not None else text


def _is(option: FieldInfo, alias: Any) -> bool:
    rules = typing.get_args(alias)[1:]
    return rules[0] in option.metadata


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE.name} written")


if __name__ == "__main__":
    main()
