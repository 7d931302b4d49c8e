# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Removing pages from a MemCache pool, for `ascend-direct pool clear`.

Owns which native calls that takes. MemCache cannot remove by prefix: MetaService lists the keys.
"""

from __future__ import annotations

from typing import Any

from ascend_direct.errors import ConfigError, StoreUnavailable
from ascend_direct.store.base import PageStatus
from ascend_direct.store.memcache_codes import CODES, UNKNOWN
from ascend_direct.store.meta_service import MetaServiceHttp

_KEYS_PER_CALL = 4096
_GONE = (PageStatus.OK, PageStatus.MISSING)


def remove_pages(native: Any, http: MetaServiceHttp | None, prefix: str) -> int | None:
    """Remove what starts with `prefix`; with "" every object, also of other programs.

    Returns how many objects were removed; None where MemCache does not say.

    Raises:
        ConfigError: there is nobody to list the keys.
        StoreUnavailable: some are left, or MetaService does not answer.
    """
    if not prefix:
        codes = [int(native.remove_all())]
    elif http is None:
        raise ConfigError(["keys are listed by MetaService: set memcache.metrics_url."])
    else:
        keys = http.keys(prefix)
        parts = (keys[i : i + _KEYS_PER_CALL] for i in range(0, len(keys), _KEYS_PER_CALL))
        codes = [int(code) for part in parts for code in native.remove_batch(part)]
        if len(codes) != len(keys):
            raise StoreUnavailable("clear", f"{len(codes)} answers for {len(keys)} keys")
    left = [code for code in codes if CODES.get(code, UNKNOWN).status not in _GONE]
    if left:
        raise StoreUnavailable("clear", f"{len(left)} removals were refused", left[0])
    return codes.count(0) if prefix else None
