# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""What a stand-in module answers when one of its names is imported: a class that cannot be used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def placeholders(module: str) -> Callable[[str], Any]:
    """Make a module's `__getattr__`."""

    def get(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def refuse(*args: Any, **kwargs: Any) -> None:
            raise NotImplementedError(
                f"{module}.{name} is a stand-in for text models; install a CPU build of torchvision"
            )

        # A class, because importers subclass such names and use them in annotations.
        return type(name, (), {"__module__": module, "__new__": refuse})

    return get
