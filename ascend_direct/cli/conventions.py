# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""What all commands do alike: options, exit codes, complaints, and how a process ends.

Owns no command.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any, NoReturn, TextIO

import typer

from ascend_direct.config import parse_bytes
from ascend_direct.errors import ConfigError, StoreUnavailable
from ascend_direct.names import CONFIG_FLAG

EXIT_OK, EXIT_CONFIG, EXIT_UNAVAILABLE = 0, 2, 3


def option(flag: str, text: str) -> Any:
    """An option that has no default to show."""
    return typer.Option(flag, help=text, show_default=False)


Config = Annotated[str | None, option("--config", "JSON or @file, as the servers have it.")]


def size_bytes(flag: str, text: str) -> int:
    """The value of an option that is a size.

    Raises:
        ConfigError: it is none; names the option.
    """
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise ConfigError([f"{flag}: {error}."]) from None


def complain(error: ConfigError | StoreUnavailable) -> int:
    """Print every reason to standard error; returns the exit code."""
    bad = isinstance(error, ConfigError)
    for reason in error.reasons if isinstance(error, ConfigError) else [str(error)]:
        # The servers' option for the configuration has another name than the commands'.
        typer.echo(f"ascend-direct: {reason.replace(CONFIG_FLAG, '--config')}", err=True)
    return EXIT_CONFIG if bad else EXIT_UNAVAILABLE


def end(code: int) -> NoReturn:
    """End the process now.

    An ordinary exit would run the destructors of the native library, which crash while one of its
    threads is still joining or leaving.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def take_stdout() -> TextIO:
    """Standard output for our lines alone: what the native library prints there goes to stderr."""
    ours = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return ours
