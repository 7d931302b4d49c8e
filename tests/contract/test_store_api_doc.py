# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""The example in docs/store_api.md is a page store: the contract runs against its text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from ascend_direct.errors import ConfigError
from ascend_direct.store.base import Memory, PageStatus, PageStore, StoreContext
from tests.contract.store_contract import StoreContract, StoreFactory

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "store_api.md"


def example() -> dict[str, Any]:
    """The names that the document's example defines."""
    (code,) = re.findall(r"^```python\n(.*?)^```$", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {"__name__": "documented_example"}
    exec(compile(code, str(DOCUMENT), "exec"), names)
    return names


class TestDocumentedExample(StoreContract):
    @pytest.fixture
    def store_factory(self, tmp_path: Path) -> StoreFactory:
        create = example()["create"]

        def make(context: StoreContext) -> PageStore:
            store: PageStore = create({"path": str(tmp_path / "pages")})
            store.open(context)
            return store

        return make


def test_the_example_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    create = example()["create"]
    with pytest.raises(ConfigError, match="exactly one option: path"):
        create({"path": "/x", "colour": "blue"})
    with pytest.raises(ConfigError, match="host memory only"):
        create({"path": str(tmp_path)}).open(StoreContext(memory=Memory.DEVICE))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot use"):
        create({"path": str(tmp_path / "file")}).open(StoreContext())


def test_the_document_names_every_status() -> None:
    text = DOCUMENT.read_text()
    assert [status.name for status in PageStatus if f"`{status.name}` |" not in text] == []


def test_the_document_is_short_enough_to_be_read() -> None:
    assert len(DOCUMENT.read_text().splitlines()) <= 150
