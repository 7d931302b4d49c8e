# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Options of `plan` that are a JSON object each: text or @file, checked name by name.

Owns what is said about a wrong one. Which names there are is the model's that is asked for.
"""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from ascend_direct import config_text
from ascend_direct.errors import ConfigError
from ascend_direct.names import CONFIG_FLAG

Model = TypeVar("Model", bound=BaseModel)


def read_object(model: type[Model], flag: str, source: str | None) -> Model:
    """The object behind `flag`.

    Raises:
        ConfigError: not JSON, an unknown name or a bad value; all of them are told.
    """
    reasons: list[str] = []
    data = config_text.read(source, reasons)
    if reasons:
        raise ConfigError([reason.replace(CONFIG_FLAG, flag) for reason in reasons])
    try:
        return model(**data)
    except ValidationError as error:
        names = ", ".join(model.model_fields)
        raise ConfigError([_told(flag, names, detail) for detail in error.errors()]) from None


def _told(flag: str, names: str, detail: Any) -> str:
    name = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        return f"{flag}: there is no {name}; there are {names}."
    return f"{flag}: {name}: {detail['msg']}."
