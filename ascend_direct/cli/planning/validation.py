# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""What `plan` says about how far it has been checked: the last run of scripts/plan_check.

Owns the sentence. The figures in validated.json are written by `scripts/plan_check --record`;
docs/benchmarks.md shows the same, which a test compares.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RECORD = Path(__file__).with_name("validated.json")
NOT_VALIDATED = "not validated against a measured run"


def record() -> dict[str, Any]:
    """date, command, limit_percent, figures: [{name, unit, measured, predicted, percent}]; {}."""
    found: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8"))
    return found


def sentence(found: dict[str, Any]) -> str:
    """For people: what was compared, and what was not as close as it should be."""
    if not found:
        return NOT_VALIDATED
    figures = [
        f"{f['name']} measured {f['measured']:,}{f['unit']}, predicted {f['predicted']:,}"
        f"{f['unit']} ({f['percent']:+.1f} %)"
        for f in found["figures"]
    ]
    limit = found["limit_percent"]
    outside = [f["name"] for f in found["figures"] if abs(f["percent"]) > limit]
    verdict = f"all within ±{limit:g} %"
    if outside:
        verdict = f"NOT within ±{limit:g} %: {', '.join(outside)}"
    return (
        f"validated {found['date']} by {found['command']}: {'; '.join(figures)}; {verdict}. Two "
        "instances on a CPU with the driver emulation, costs measured in the same run; table "
        "values of NPUs are not validated (E0)"
    )
