# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""A pool behind a third-party provider, and the switches of its faults.

Owns the folder that makes `faulty_store` an installed provider, as pip would. The provider's
behaviour is faulty_store's.
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


class Faults:
    """What the provider's processes do wrong, from now on and all alike."""

    def __init__(self, control: Path) -> None:
        self._control = control
        control.mkdir()

    @contextmanager
    def on(self, operation: str, mode: str) -> Iterator[None]:
        """Disturb `exists`, `get` or `put` inside the block; modes as faulty_store has them."""
        path = self._control / operation
        written = path.with_suffix(".new")
        written.write_text(mode)
        written.replace(path)
        try:
            yield
        finally:
            path.unlink()

    def count(self, operation: str, mode: str) -> int:
        """How many calls were disturbed this way so far."""
        try:
            calls = (self._control / "calls").read_text().splitlines()
        except FileNotFoundError:
            return 0
        return sum(call.startswith(f"{operation} {mode} ") for call in calls)


class FaultyPool(Pool):
    """The local pool behind `faulty_store`, which servers find as an installed provider."""

    name = "local, through a provider with faults"

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._site = folder / "site"
        self._local = LocalPool()
        self.faults = Faults(folder / "control")
        self._control = folder / "control"
        _install(self._site)

    def start(self) -> None:
        self._local.start()

    def stop(self) -> None:
        self._local.stop()

    def options(self) -> dict[str, Any]:
        local = self._local.options()["local"]
        return {"store": PROVIDER, "provider": {**local, "control": str(self._control)}}

    def environment(self) -> dict[str, str]:
        inherited = os.environ.get("PYTHONPATH")
        return {"PYTHONPATH": os.pathsep.join(filter(None, (str(self._site), inherited)))}

    def stored_pages(self) -> int:
        return self._local.stored_pages()


def _install(site: Path) -> None:
    """What `pip install` leaves behind for a package with an entry point."""
    metadata = site / "e2e_faulty_store-1.0.dist-info"
    metadata.mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("faulty_store.py"), site / "e2e_faulty_store.py")
    (metadata / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: e2e-faulty-store\nVersion: 1.0\n"
    )
    (metadata / "entry_points.txt").write_text(
        f"[ascend_direct.stores]\n{PROVIDER} = e2e_faulty_store:create\n"
    )
