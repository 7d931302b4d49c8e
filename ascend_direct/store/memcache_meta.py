# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Runs MemCache's MetaService in this process, for `ascend-direct meta`; ends with its parent.

Owns the settings in the native service's words. They are checked by the command: the service takes
any value without a word. Settings come as one JSON object on the command line; paths of keys come
by the environment (`ASCEND_DIRECT_MEMCACHE__TLS__…`), as everywhere.
"""

from __future__ import annotations

import ctypes
import json
import signal
import sys
from typing import Any

from ascend_direct.config import DirectConfig, TlsConfig

_PR_SET_PDEATHSIG = 1


def settings_of(library: Any, options: dict[str, Any], tls: TlsConfig) -> Any:
    """The native settings: `options` under their own names, TLS for both of its listeners."""
    settings = library.MetaConfig()
    for name, value in options.items():
        setattr(settings, name, value)
    if tls.enabled:
        for prefix in ("tls", "config_store_tls"):
            setattr(settings, f"{prefix}_enable", True)
            for name in TlsConfig.model_fields.keys() - {"enabled"}:
                setattr(settings, f"{prefix}_{name}", getattr(tls, name))
    return settings


def main() -> int:
    """Serve until a signal; 0 when the service ended in order."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    import memcache_hybrid

    tls = DirectConfig.load(None).memcache.tls
    settings = settings_of(memcache_hybrid, json.loads(sys.argv[1]), tls)
    code: int = memcache_hybrid.MetaService.setup(settings)
    if code == 0:
        code = memcache_hybrid.MetaService.main()
    return int(code != 0)


if __name__ == "__main__":
    sys.exit(main())
