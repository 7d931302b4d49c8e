# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""The C++ packer against the torch reference, bit by bit; how pages become launches of the Triton
kernel, and that they end. The kernel itself: tests/kernels/test_copy_fragments.py."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ascend_direct.errors import ConfigError
from ascend_direct.store import page_packer
from ascend_direct.store.base import PageBatch
from ascend_direct.store.device_page_packer import Accelerator, DeviceBlock, runs
from ascend_direct.store.page_packer import HostBlock
from kernels.page_packing import reference
from tests.contract.store_contract import Arena

lengths_of_fragments = st.lists(st.sampled_from([1, 3, 64, 257, 4096]), min_size=1, max_size=9)


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 9),
    lengths=lengths_of_fragments,
    threads=st.integers(1, 5),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_native_packer_agrees_with_the_reference_both_ways(
    count: int, lengths: list[int], threads: int, seed: int
) -> None:
    rng, arena = np.random.default_rng(seed), Arena()
    pages = arena.place(count, lengths, rng)
    arena.scramble(rng)
    starts = torch.from_numpy(pages.addresses - arena.address)
    block = HostBlock(count * pages.page_bytes + 64, threads)
    block.bytes[:] = 0xA5
    block.pack(pages)
    expected = reference.pack(torch.from_numpy(arena.bytes), starts, lengths)
    assert block.bytes[:-64].tobytes() == expected.numpy().tobytes()
    assert set(block.bytes[-64:].tolist()) == {0xA5}, "written past the pages"

    block.bytes[:] = np.frombuffer(rng.bytes(len(block.bytes)), np.uint8)
    rows = sorted(rng.permutation(count)[: rng.integers(0, count + 1)].tolist())
    memory = torch.from_numpy(arena.bytes.copy())
    packed = torch.from_numpy(block.bytes[:-64].reshape(count, -1))
    reference.unpack(packed[rows], memory, starts[rows], lengths)
    block.unpack(pages, rows)
    assert arena.bytes.tobytes() == memory.numpy().tobytes()


def test_a_block_begins_on_a_boundary_of_memory_pages() -> None:
    assert HostBlock(100).region.address % 4096 == 0


def test_without_the_native_code_it_is_said_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_packer, "LIBRARY", "ascend_direct.store._was_not_built")
    with pytest.raises(ConfigError, match=r"no C\+\+ compiler.*set transfer to scatter"):
        HostBlock(100)


def test_a_file_that_is_no_library_is_said_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "not_a_library.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(page_packer, "LIBRARY", "not_a_library")
    with pytest.raises(ConfigError, match=r"invalid ELF header|file too short"):
        HostBlock(100)


def test_the_native_code_gives_the_interpreter_lock_away() -> None:
    """Else a copy of 32 MiB would stop the scheduler."""
    assert type(page_packer.native_library()) is ctypes.CDLL


# --- how pages become launches


def addresses(*rows: list[int]) -> np.ndarray:
    return np.array(rows, np.int64)


def test_an_npu_pool_is_one_run_for_each_part() -> None:
    """K of all layers, then V of all layers, is how the NPU pools lie; a page names k, v, k, v …"""
    layers, pages = 4, np.array([3, 9])
    bases = [1000 + part * 10**6 + layer * 10**4 for part in range(2) for layer in range(layers)]
    found = runs(np.array(bases)[None] + pages[:, None] * 64, [64] * 8)
    assert [(run.first, run.fragments, run.step_bytes) for run in found] == [
        (0, 4, 10**4),
        (4, 4, 10**4),
    ]


@settings(max_examples=80, deadline=None)
@given(
    count=st.integers(1, 4),
    lengths=st.lists(st.sampled_from([16, 64]), min_size=1, max_size=12),
    regular=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_runs_hold_every_fragment_once_and_tell_where_it_lies(
    count: int, lengths: list[int], regular: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    if regular:
        rows = 1000 + np.arange(len(lengths))[None] * 128 + rng.permutation(count)[:, None] * 9999
    else:
        rows = Arena().place(count, lengths, rng).addresses
    batch, seen = PageBatch(rows.astype(np.int64), tuple(lengths)), []
    for run in runs(batch.addresses, lengths):
        assert run.offset_bytes == sum(lengths[: run.first])
        for i in range(run.fragments):
            seen.append(run.first + i)
            assert lengths[run.first + i] == run.length_bytes
            told = batch.addresses[:, run.first] + i * run.step_bytes
            assert told.tolist() == batch.addresses[:, run.first + i].tolist()
    assert seen == list(range(len(lengths)))


# --- a device that is behind


class LateDevice:
    """A device, as torch's module for it, whose one stream works when it is waited for."""

    def __init__(self) -> None:
        self.todo: list[str] = []
        self.done: list[str] = []

    def Stream(self, device: torch.device) -> LateDevice:
        return self

    def synchronize(self) -> None:
        self.done += self.todo
        self.todo.clear()

    def device(self, index: int) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def stream(self, stream: LateDevice) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def get_device_properties(self, index: int) -> SimpleNamespace:
        return SimpleNamespace(multi_processor_count=1)

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        """As a kernel that has no binary for its second launch."""
        return self._launch

    def _launch(self, *arguments: Any, **options: Any) -> None:
        if self.todo:
            raise RuntimeError("no binary")
        self.todo.append("launch")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> LateDevice:
    late, zeros = LateDevice(), torch.zeros

    def zeroed(*shape: int, **options: Any) -> torch.Tensor:
        late.todo.append("zeros")
        return zeros(*shape, **options)

    kernel = SimpleNamespace(copy_fragments=late)
    monkeypatch.setitem(sys.modules, "ascend_direct.store.copy_fragments", kernel)
    monkeypatch.setattr(torch, "get_device_module", lambda kind: late)
    monkeypatch.setattr(torch, "zeros", zeroed)
    return late


def test_a_new_block_is_zero_before_anything_is_packed(device: LateDevice) -> None:
    DeviceBlock(64, Accelerator("cpu", 0))
    assert device.done == ["zeros"]


def test_a_call_that_fails_half_way_has_ended_when_it_returns(device: LateDevice) -> None:
    """The pages are SGLang's again at once: a launch that is behind would write into others."""
    block = DeviceBlock(64, Accelerator("cpu", 0))
    two_runs = PageBatch(addresses([4096, 8192]), (4, 8))
    with pytest.raises(RuntimeError, match="no binary"):
        block.unpack(two_runs, [0])
    assert device.done == ["zeros", "launch"]
    assert device.todo == []
