# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Whatever lies in the local store's file: a page is right or not OK, and nothing crashes."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ascend_direct.store.base import PageStatus, StoreContext
from ascend_direct.store.local import LocalStore, create
from tests.contract.store_contract import Arena, new_keys
from tests.fuzz.budget import FUZZ, PROFILE

OK, MISSING, MISMATCH = PageStatus.OK, PageStatus.MISSING, PageStatus.MISMATCH
LENGTHS = (96, 33, 64)
DAMAGED_FILES = 400 if PROFILE == "deep" else 24
ROOT = Path(__file__).resolve().parents[2]

Change = Callable[[bytes, bytes], bytes]  # an object and another page's → what lies there now


def _flip(where: float, bit: int) -> Change:
    def change(data: bytes, _other: bytes) -> bytes:
        changed = bytearray(data)
        changed[int(where * len(data))] ^= 1 << bit
        return bytes(changed)

    return change


CHANGES = st.one_of(
    st.floats(0, 1).map(lambda part: lambda data, _: data[: int(part * len(data))]),
    st.binary(min_size=1, max_size=64).map(lambda tail: lambda data, _: data + tail),
    st.binary(max_size=300).map(lambda foreign: lambda *_: foreign),
    st.builds(_flip, st.floats(0, 1, exclude_max=True), st.integers(0, 7)),
    st.just(lambda _, other: other),
    st.binary(min_size=1, max_size=40).map(lambda head: lambda data, _: head + data[len(head) :]),
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStore]:
    path = tmp_path_factory.mktemp("fuzz") / "pages"
    store = create({"path": str(path), "size_bytes": 64 << 20})
    assert isinstance(store, LocalStore)
    store.open(StoreContext())
    yield store
    store.close()


@given(change=CHANGES, seed=st.integers(0, 2**32 - 1))
@FUZZ
def test_an_object_that_was_changed_is_right_or_not_ok_and_its_neighbours_are_right(
    store: LocalStore, change: Change, seed: int
) -> None:
    rng, arena, keys = np.random.default_rng(seed), Arena(1 << 14), new_keys(3)
    pages = arena.place(3, LENGTHS, rng)
    arena.scramble(rng)
    stored = [arena.read(pages, row) for row in range(3)]
    assert store.put(keys, pages) == [OK] * 3
    with store._env.begin(write=True, db=store._objects) as txn:
        was, other = txn.get(keys[1].encode()), txn.get(keys[0].encode())
        now = change(was, other)
        txn.put(keys[1].encode(), now)

    target = arena.place(3, LENGTHS, rng)
    arena.scramble(rng)
    guards = arena.outside(target)
    answers = store.get(keys, target)
    assert answers == [OK, OK if now == was else MISMATCH, OK]
    assert arena.outside(target) == guards
    for row in range(3):
        assert answers[row] is not OK or arena.read(target, row) == stored[row]


# --- the file itself. LMDB trusts its file, so this happens in a process that may die.

READER = """
import sys, json
import numpy as np
from ascend_direct.errors import ConfigError, StoreUnavailable
from ascend_direct.store.base import PageBatch, PageStatus, StoreContext
from ascend_direct.store.local import create
memory = np.zeros((60, 1000), np.uint8)
pages = PageBatch(memory.ctypes.data + 1000 * np.arange(60).reshape(60, 1), (1000,))
keys = [f"key {i}" for i in range(60)]
for path in sys.argv[2:]:
    store, wrong = create({"path": path, "size_bytes": 4 << 20}), 0
    try:
        store.open(StoreContext())
        if sys.argv[1] == "write":
            memory[:] = np.arange(60, dtype=np.uint8).reshape(60, 1)
            assert store.put(keys, pages) == [PageStatus.OK] * 60
        else:
            memory[:] = 255
            answers = store.get(keys, pages)
            good = [i for i, answer in enumerate(answers) if answer is PageStatus.OK]
            wrong = sum((memory[i] != i).any() for i in good)
            store.put([f"new {i}" for i in range(60)], pages)
        said = "served"
    except (ConfigError, StoreUnavailable) as error:
        said = type(error).__name__
    store.close()
    print(json.dumps([said, int(wrong)]), flush=True)
"""


def _in_a_process(what: str, *paths: Path) -> tuple[list[tuple[str, int]], int]:
    """What was said of each file until the process ended, and how it ended."""
    command = [sys.executable, "-c", READER, what, *map(str, paths)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert "Traceback" not in done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()], done.returncode


def test_a_file_with_flipped_bytes_or_a_cut_end_never_yields_wrong_pages(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    assert _in_a_process("write", whole) == ([("served", 0)], 0)
    paths, dice = [], random.Random(None if PROFILE == "deep" else 5)
    for number in range(DAMAGED_FILES):
        paths.append(tmp_path / str(number))
        shutil.copytree(whole, paths[-1])
        file = paths[-1] / "data.mdb"
        data = bytearray(file.read_bytes())
        for _ in range(dice.choice((1, 8, 64, 512))):
            data[dice.randrange(len(data))] = dice.randrange(256)
        cut = dice.random() < 0.2
        file.write_bytes(data[: dice.randrange(len(data))] if cut else data)
    said, deaths = [], 0
    while paths:
        some, code = _in_a_process("read", *paths)
        said += some
        deaths += code != 0
        paths = paths[len(some) + 1 :]
    assert [wrong for _, wrong in said] == [0] * len(said)
    assert {what for what, _ in said} > {"served"}, "some damage was noticed at once"
    # About one in a hundred such files makes LMDB itself abort: docs/operations.md says so.
    assert deaths <= DAMAGED_FILES // 20
