# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""A pool behind a third-party provider, and the switches of its faults.

Owns the folder that makes `faulty_store` an installed provider, as pip would. The provider's
behaviour is faulty_store's; what it disturbs is any other pool.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from two_instances.cluster import LocalPool, Pool

PROVIDER = "e2e_faulty"
MODULES = ("__init__.py", "faulty_store.py", "stall_probe.py")


class Faults:
    """What the provider's processes do wrong, from now on and all alike."""

    def __init__(self, control: Path) -> None:
        self._control = control
        control.mkdir()

    @contextmanager
    def on(self, operation: str, mode: str) -> Iterator[None]:
        """Disturb `exists`, `get` or `put` inside the block, or let `die`; modes as faulty_store
        has them."""
        path = self._control / operation
        written = path.with_suffix(".new")
        written.write_text(mode)
        written.replace(path)
        try:
            yield
        finally:
            path.unlink()

    def stalls(self) -> list[str]:
        """What stall_probe has seen in the schedulers so far, a line each."""
        path = self._control / "stalls"
        return path.read_text().splitlines() if path.exists() else []

    def count(self, operation: str, mode: str) -> int:
        """How many calls were disturbed this way so far."""
        try:
            calls = (self._control / "calls").read_text().splitlines()
        except FileNotFoundError:
            return 0
        return sum(call.startswith(f"{operation} {mode} ") for call in calls)


class FaultyPool(Pool):
    """A pool behind `faulty_store`, which servers find as an installed provider.

    Args:
        inner: the pool that is disturbed; the local one by default.
    """

    def __init__(self, folder: Path, inner: Pool | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._site = folder / "site"
        self._inner = inner or LocalPool()
        self.name = f"{self._inner.name}, through a provider with faults"
        self.faults = Faults(folder / "control")
        self._control = folder / "control"
        _install(self._site)

    def start(self) -> None:
        self._inner.start()

    def stop(self) -> None:
        self._inner.stop()

    def options(self) -> dict[str, Any]:
        options = self._inner.options()
        store = options["store"]
        section = {**options[store], "store": store, "control": str(self._control)}
        return {"store": PROVIDER, "provider": section}

    def environment(self) -> dict[str, str]:
        inherited = os.environ.get("PYTHONPATH")
        path = os.pathsep.join(filter(None, (str(self._site), inherited)))
        return {**self._inner.environment(), "PYTHONPATH": path}

    def stored_pages(self) -> int:
        return self._inner.stored_pages()


def _install(site: Path) -> None:
    """What `pip install` leaves behind for a package with an entry point."""
    metadata, package = site / "e2e_faulty_store-1.0.dist-info", site / "e2e_faulty_store"
    metadata.mkdir(parents=True)
    package.mkdir()
    for module in MODULES:
        shutil.copy(Path(__file__).with_name(module), package / module)
    (metadata / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: e2e-faulty-store\nVersion: 1.0\n"
    )
    (metadata / "entry_points.txt").write_text(
        f"[ascend_direct.stores]\n{PROVIDER} = e2e_faulty_store.faulty_store:create\n"
    )
