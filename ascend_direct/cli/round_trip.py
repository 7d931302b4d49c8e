# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""One page to the pool and back, in a process that `doctor` can give up: join, put, get, remove.

Reads the configuration's source as one JSON value from standard input, writes JSON lines. Ends at
once when it has spoken: the native library may take a minute to leave the pool.
"""

from __future__ import annotations

import ctypes
import json
import secrets
import sys
import time
from typing import Any

import numpy as np

from ascend_direct.cli.conventions import EXIT_OK, end, take_stdout
from ascend_direct.cli.pool_clear import client_store
from ascend_direct.device import Device
from ascend_direct.errors import ConfigError, StoreError
from ascend_direct.page_key import KEY_VERSION
from ascend_direct.store.base import PageBatch, PageStatus, PageStore, StoreContext

PAGE_BYTES = 1 << 20


def chip() -> str | None:
    """The SoC's name from the Ascend runtime, None where there is none."""
    try:
        library = ctypes.CDLL("libascendcl.so")
        library.aclrtGetSocName.restype = ctypes.c_char_p
        name: bytes | None = library.aclrtGetSocName()
    except (OSError, AttributeError):
        return None
    return name.decode(errors="replace") if name else None


def trial(store: PageStore) -> dict[str, Any]:
    """Put a page of random bytes, read it back, compare, remove it.

    Raises:
        StoreError, ConfigError: the pool does not answer, or cannot be used here.
    """
    sent = np.frombuffer(secrets.token_bytes(PAGE_BYTES), np.uint8).copy()
    got = np.zeros_like(sent)
    prefix = f"{KEY_VERSION}:{secrets.token_hex(8)}:"
    keys = [f"{prefix}-:{secrets.token_hex(32)}"]
    memory = Device.of("cpu").memory
    store.open(StoreContext(memory=memory, page_bytes=PAGE_BYTES))
    times_ms = {}
    for name, call, buffer in (("put", store.put, sent), ("get", store.get, got)):
        batch = PageBatch(np.full((1, 1), buffer.ctypes.data, np.int64), (PAGE_BYTES,))
        begin_s = time.perf_counter()
        (status,) = call(keys, batch)
        times_ms[f"{name}_ms"] = round((time.perf_counter() - begin_s) * 1e3, 2)
        if status is not PageStatus.OK:
            return {"ok": False, "problem": f"the pool answered {name} with {status.name}."}
    if not np.array_equal(sent, got):
        return {"ok": False, "problem": "the page came back with other bytes: do not use it."}
    try:
        store.clear(prefix)
    except (ConfigError, StoreError):
        times_ms["left"] = 1  # without metrics_url keys cannot be listed; it will be evicted
    return {"ok": True, "bytes": PAGE_BYTES, **times_ms}


def main() -> None:
    """Say what came of it, and end."""
    out = take_stdout()

    def say(event: dict[str, Any]) -> None:
        print(json.dumps(event), file=out, flush=True)

    say({"chip": chip()})
    try:
        store, _ = client_store(json.load(sys.stdin))
        say(trial(store))
    except (ConfigError, StoreError) as error:
        reasons = error.reasons if isinstance(error, ConfigError) else [f"{error}."]
        say({"ok": False, "problem": " ".join(reasons)})
    end(EXIT_OK)


if __name__ == "__main__":
    main()
