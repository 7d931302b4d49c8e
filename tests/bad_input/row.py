# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""One mistake of an operator, and how the launcher of a real SGLang ends with it.

Runs what `python -m sglang.launch_server` does up to the point where it would start processes:
plugins, command line, resolution. Owns no rows (table does) and starts no process.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ascend_direct import names

from ..integration.launching import command_line, load_plugin


class Place:
    """Where a row may make files and change what the machine looks like, for one test.

    Attributes:
        path: an empty directory.
        patch: what it changes is changed back.
        until_end: what is entered here is left when the test ends.
    """

    def __init__(self, path: Path, patch: pytest.MonkeyPatch, until_end: ExitStack) -> None:
        self.path = path
        self.patch = patch
        self.until_end = until_end


@dataclass(frozen=True)
class Row:
    """A mistake and what must be said about it.

    Attributes:
        name: the mistake, as the test's name.
        said: what each reason must hold, in the order of the reasons; `|` separates parts.
        options: the cache's options beside those that work; None leaves them out.
        text: instead of options, the text of --hierarchical-cache-direct-config.
        args: further arguments of the server. `{place}` stands for the row's directory.
        env: variables of the server.
        prepare: makes the machine wrong.
        flag: whether --enable-hierarchical-cache-direct is given.
        raised_by_sglang: SGLang's own check comes first; its message must be as clear.
    """

    name: str
    said: tuple[str, ...]
    options: Mapping[str, Any] | None = field(default_factory=dict)
    text: str | None = None
    args: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    prepare: Callable[[Place], None] | None = None
    flag: bool = True
    raised_by_sglang: bool = False

    def command_line(self, place: Place) -> list[str]:
        """Arguments of `sglang.launch_server`."""

        def here(text: str) -> str:
            return text.replace("{place}", str(place.path))

        text = self.text
        if text is None and self.options is not None:
            working = {"store": "local", "local": {"path": "{place}/pages"}, "model_id": "tiny"}
            text = json.dumps({**working, **self.options})
        ours = [names.FLAG] * self.flag
        ours += [] if text is None else [names.CONFIG_FLAG, here(text)]
        return command_line(*ours, *map(here, self.args))


def stopped(row: Row, place: Place) -> BaseException:
    """What ends the launcher; fails when nothing does."""
    for name, value in row.env.items():
        place.patch.setenv(name, value.replace("{place}", str(place.path)))
    if row.prepare is not None:
        row.prepare(place)
    load_plugin()
    from sglang.srt.server_args import prepare_server_args

    try:
        args = prepare_server_args(row.command_line(place))
        args.resolve_once()
        args.check_server_args()
    except (Exception, SystemExit) as error:  # noqa: BLE001 (it is what is asked for)
        return error
    pytest.fail("the server would have started")
