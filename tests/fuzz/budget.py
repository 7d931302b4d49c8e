# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""How much is generated: the same few examples in every CI run, more on demand.

`FUZZ_PROFILE=deep pytest tests/fuzz` draws new examples, twenty times as many.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

_COMMON = {
    "deadline": None,  # of hypothesis; the tests have their own where time is promised
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
}
settings.register_profile("ci", max_examples=150, derandomize=True, database=None, **_COMMON)
settings.register_profile("deep", max_examples=3000, **_COMMON)

PROFILE = os.environ.get("FUZZ_PROFILE", "ci")
FUZZ = settings(settings.get_profile(PROFILE))
# Where one example costs milliseconds.
FUZZ_SLOW = settings(FUZZ, max_examples=max(1, FUZZ.max_examples // 3))
