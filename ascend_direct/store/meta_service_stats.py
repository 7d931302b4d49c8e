# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""What `pool stats` and `pool ls` ask a MetaService: counters, the memory of each member, keys.

Owns the reading of these answers, checked because they come from the network. Connections are
meta_service's.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, field

from ascend_direct.errors import StoreUnavailable
from ascend_direct.page_key import KEY_VERSION
from ascend_direct.store.meta_service import _NO_ANSWER, MetaServiceHttp, _naturals

_COUNTER = re.compile(r"\b([a-z_]+)=(\d{1,18})(?=\s|$)")
_KEY = re.compile(rf"{KEY_VERSION}:([0-9a-f]{{16}}):([^:]*):")


@dataclass(frozen=True)
class Segment:
    """Memory that one member gives."""

    name: str
    medium: str
    total_bytes: int
    used_bytes: int


@dataclass
class Namespace:
    """Objects of one model and layout; `parts` are ranks or ranges of heads, `-` for replicas."""

    objects: int = 0
    parts: Counter[str] = field(default_factory=Counter)


def counters(http: MetaServiceHttp) -> dict[str, int]:
    """MetaService's counters since it was started, by its own names (`keys`, `evict`, `get_req` …).

    Raises:
        StoreUnavailable: it does not answer, or not in this form.
    """
    try:
        found = {
            name: int(value) for name, value in _COUNTER.findall(http._get("/metrics/summary"))
        }
    except _NO_ANSWER as error:
        raise StoreUnavailable(
            "stats",
            f"MetaService does not tell its counters ({error}): start it, or correct "
            "memcache.metrics_url.",
        ) from error
    if "keys" not in found:
        raise StoreUnavailable("stats", "/metrics/summary is not that of a MetaService")
    return found


def segments(http: MetaServiceHttp) -> list[Segment]:
    """Memory of the pool, by member.

    Raises:
        StoreUnavailable: no answer, or not in this form.
    """
    try:
        rows = json.loads(http._get("/api/v1/capacity/segment_remaining"))["segments"]
        return [
            Segment(
                str(row["segment_name"]),
                str(row["medium"]),
                *_naturals(row["total_bytes"], row["used_bytes"]),
            )
            for row in rows
        ]
    except _NO_ANSWER as error:
        raise StoreUnavailable(
            "stats", f"MetaService does not tell its memory ({error})"
        ) from error


def namespaces(keys: list[str]) -> dict[str, Namespace]:
    """Our keys by namespace; those of other programs under ``""``."""
    found: dict[str, Namespace] = {}
    for key in keys:
        match = _KEY.match(key)
        name, part = match.groups() if match else ("", "")
        namespace = found.setdefault(name, Namespace())
        namespace.objects += 1
        namespace.parts[part] += 1
    return found
