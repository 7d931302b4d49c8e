# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""How a benchmark's worker, a process that has joined a MemCache pool, begins and ends."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn


def run(main: Callable[..., None]) -> NoReturn:
    """Call `main` with the words of the command line, and end the process.

    Without an interpreter's ordinary exit: it runs the destructors of the native library, which
    abort the process while one of its threads is still leaving the pool.
    """
    main(*sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
