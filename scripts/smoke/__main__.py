# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Runs the steps one after another and writes one report; green only if every step passed."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from smoke.place import Place
from smoke.steps import Family, StepFailed, doctor, versions

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130
# What the proposal (SGLang PR 14056) reports for TTFT at 100 % and 50 % reuse on its machine: shown
# beside a result, never taken for one.
PROPOSAL_TTFT_CHANGE = {"100 % reuse": -0.935, "50 % reuse": -0.466}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Options of scripts/npu_smoke."""
    parser = argparse.ArgumentParser(
        prog="scripts/npu_smoke",
        description="doctor, a pool, two servers, repeat accuracy, loss and return of the pool, "
        "TTFT; for each model family, into one JSON report. Exit codes: 0 every step passed; "
        "1 not; 2 wrong options, or no NPU; 130 interrupted.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--emulated", action="store_true", help="the same steps on a CPU; not an NPU result")
    add("--families", nargs="+", choices=("gqa", "mla"), default=None, help="all on NPUs, else gqa")
    add("--gqa-model", type=Path, help="model folder; emulated: made on the spot")
    add("--mla-model", type=Path, help="the same for MLA")
    add("--tp", type=int, default=1, help="ranks of each server; NPUs needed: twice as many")
    add("--protocol", help="A3: device_sdma, A2: device_rdma; emulated: host_shm")
    add("--pool-size", help="DRAM of the pool; 64GB, emulated 1GB")
    add("--page-size", type=int, help="128, emulated 64")
    add("--prompts", type=int, help="100, emulated 3")
    add("--prompt-tokens", type=int, default=3500, help="tokens of each")
    add("--out", type=Path, default=Path("npu_smoke"), help="folder for report.json and logs")
    options = parser.parse_args(argv)
    if not options.emulated and options.protocol is None:
        parser.error("--protocol is needed: device_sdma on A3, device_rdma on A2")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; an exit code."""
    options, console = parse(argv), Console()
    emulated = options.emulated
    if not emulated and importlib.util.find_spec("torch_npu") is None:
        console.print("no torch_npu here: run on a machine with NPUs, or --emulated")
        return EXIT_USAGE
    place = Place(
        emulated=emulated,
        protocol=options.protocol or "host_shm",
        tp_size=options.tp,
        pool_size=options.pool_size or ("1GB" if emulated else "64GB"),
    )
    smoke = Smoke(place, options, console)
    try:
        smoke.run()
    except KeyboardInterrupt:
        console.print("interrupted; everything that was started has been stopped")
        return EXIT_INTERRUPTED
    except ValueError as error:
        console.print(str(error), markup=False)
        return EXIT_USAGE
    path = options.out / "report.json"
    path.write_text(json.dumps(smoke.report(), indent=1) + "\n", encoding="utf-8")
    console.print(f"{'PASSED' if smoke.ok else 'FAILED'} on {place.kind}; {path}", soft_wrap=True)
    return EXIT_OK if smoke.ok else EXIT_FAILED


class Smoke:
    """One run: its steps and what became of them."""

    def __init__(self, place: Place, options: argparse.Namespace, console: Console) -> None:
        self._place, self._options, self._console = place, options, console
        self._steps: list[dict[str, Any]] = []

    @property
    def ok(self) -> bool:
        """Something ran, and nothing failed."""
        return bool(self._steps) and all(step["status"] == "passed" for step in self._steps)

    def run(self) -> None:
        """Every step; those of a family end with the first that fails."""
        options, emulated = self._options, self._place.emulated
        families = options.families or (["gqa"] if emulated else ["gqa", "mla"])
        options.out.mkdir(parents=True, exist_ok=True)
        given = {"gqa": options.gqa_model, "mla": options.mla_model}
        models = {f: self._place.model(f, given[f], options.out / "models") for f in families}
        self._step("doctor", lambda: doctor(self._place))
        for name, model in models.items():
            folder = options.out / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
            folder.mkdir()
            family = Family(
                self._place,
                model,
                folder,
                prompts=options.prompts or (3 if emulated else 100),
                prompt_tokens=options.prompt_tokens,
                page_size=options.page_size or (64 if emulated else 128),
                say=self._say,
            )
            try:
                for step in family.steps:
                    if not self._step(f"{name}: {step.__name__}", step):
                        break
            finally:
                family.close()

    def report(self) -> dict[str, Any]:
        """Everything, as it is written."""
        return {
            "ok": self.ok,
            "machine": self._place.kind,
            "protocol": self._place.protocol,
            "versions": versions(),
            "reference_ttft_change_of_the_proposal": PROPOSAL_TTFT_CHANGE,
            "steps": self._steps,
        }

    def _step(self, name: str, body: Callable[[], dict[str, Any]]) -> bool:
        begin_s = time.monotonic()
        row: dict[str, Any] = {"step": name, "status": "passed"}
        try:
            row["facts"] = body()
        except (StepFailed, RuntimeError, OSError) as error:
            row |= {"status": "failed", "why": f"{type(error).__name__}: {error}"}
        row["seconds"] = round(time.monotonic() - begin_s, 1)
        self._steps.append(row)
        self._say(f"{name}: {row['status']} {row.get('why', '')}")
        return bool(row["status"] != "failed")

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
