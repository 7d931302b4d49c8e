# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Every error this package raises on purpose.

    DirectError
    ├── ConfigError        a start-up choice is wrong; carries every reason at once
    ├── LayoutError        a KV pool cannot be described page by page
    └── StoreError         a store call failed as a whole (per-page failures are `PageStatus`)
        └── StoreUnavailable   nobody answers: not started, gone, or past its deadline

Start-up errors end the process with `str(error)`. Nothing here ever reaches a client's request.
"""

from __future__ import annotations

from collections.abc import Sequence


class DirectError(Exception):
    """Root of the package's errors."""


class ConfigError(DirectError, ValueError):
    """The configuration or the server mode cannot work.

    Args:
        reasons: every problem found, each one a sentence that says what to do.
    """

    def __init__(self, reasons: Sequence[str]) -> None:
        if not reasons:
            raise AssertionError("a ConfigError needs at least one reason")
        self.reasons = tuple(reasons)
        super().__init__(
            "--enable-hierarchical-cache-direct cannot start:\n"
            + "\n".join(f"  * {reason}" for reason in self.reasons)
        )


class LayoutError(DirectError):
    """A KV pool has a shape, dtype or addressing that pages cannot be cut from."""


class StoreError(DirectError):
    """A store call failed as a whole.

    Args:
        operation: the call, in the store's own words (``put``, ``get``, ``exists``, ``init``).
        detail: what happened and what to do next.
        code: the native return code, where there is one.
    """

    def __init__(self, operation: str, detail: str, code: int | None = None) -> None:
        self.operation = operation
        self.code = code
        suffix = "" if code is None else f" (code {code})"
        super().__init__(f"{operation}: {detail}{suffix}")


class StoreUnavailable(StoreError):
    """The store does not answer; trying again later may work."""
