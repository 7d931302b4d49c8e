# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""SGLang's real KV pools, cut into pages: each byte once, and the bytes SGLang means.

Every supported class is built by SGLang's own constructor on CPU tensors; the Ascend classes behind
tests/fakes/torch_npu_stub.py. What belongs to a page is read from SGLang's buffers by its own
indices (`tensors_by_page`), never from the layout under test.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import inspect
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import sglang.srt.hardware_backend.npu.memory_pool_npu as npu_pools
import sglang.srt.mem_cache.memory_pool as pools
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sglang.srt.environ import envs
from sglang.srt.layers.quantization.fp4_kv_cache_quant_method import (
    CPUFP8KVCacheMethod,
    FP4MXBlock16KVCacheMethod,
)
from sglang.srt.runtime_context import get_parallel

from ascend_direct.errors import LayoutError
from ascend_direct.integration.pool_layout import describe_pool, is_replicated
from ascend_direct.page_layout import PageLayout
from tests.fakes.torch_npu_stub import ascend_pools

# Imported for their pool classes: every one must be supported, or refused by name.
for name in (
    "deepseek_v4_memory_pool",
    "dsa_cache_layer_split",
    "hisparse_memory_pool",
    "minimax_m3_nvfp4_pool",
    "page_interleave_pool",
    "qsa_kv_pool",
    "swa_memory_pool",
    "unified_draft_pool",
    "unified_memory_pool",
):
    importlib.import_module(f"sglang.srt.mem_cache.{name}")

# Pools are slow to build on shared machines; each example builds one.
some_shapes = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn


class Shape(SimpleNamespace):
    """A random small pool."""

    pages: int  # usable ones, the padding page not counted
    spare: int  # tokens after the last whole page
    page_size: int
    layers: int
    first_layer: int
    heads: int
    dim: int
    seed: int


def shape(**fixed: Any) -> Shape:
    usual = {
        "pages": 3,
        "spare": 0,
        "page_size": 4,
        "layers": 2,
        "first_layer": 0,
        "heads": 2,
        "dim": 8,
    }
    return Shape(**{**usual, "seed": 7, **fixed})


shapes = st.builds(
    Shape,
    pages=st.integers(1, 5),
    spare=st.just(0),
    page_size=st.sampled_from([1, 2, 16, 64, 128]),
    layers=st.integers(1, 3),
    first_layer=st.sampled_from([0, 5]),
    heads=st.integers(1, 3),
    dim=st.sampled_from([2, 8, 16]),
    seed=st.integers(0, 2**16),
)


def common(s: Shape) -> dict[str, Any]:
    return {
        "size": s.pages * s.page_size + s.spare,
        "page_size": s.page_size,
        "layer_num": s.layers,
        "device": "cpu",
        "enable_memory_saver": False,
        "start_layer": s.first_layer,
        "end_layer": s.first_layer + s.layers - 1,
    }


def make_mha(s: Shape, **extra: Any) -> Any:
    arguments = {"dtype": BF16, "head_num": s.heads, "head_dim": s.dim, **common(s), **extra}
    return pools.MHATokenToKVPool(**arguments)


def make_hnd(s: Shape) -> Any:
    with envs.SGLANG_USE_HND_KVCACHE.override(True):
        return make_mha(s)


def make_vectorized(s: Shape) -> Any:
    """AITER's layout; its shape rules need pages and heads of multiples of 8."""
    tiled = Shape(**{**vars(s), "page_size": max(8, s.page_size), "dim": max(8, s.dim)})
    with (
        pytest.MonkeyPatch.context() as patch,
        envs.SGLANG_AITER_KV_CACHE_LAYOUT.override("vectorized_5d"),
    ):
        patch.setattr(pools, "_use_aiter", True)
        return make_mha(tiled)


def make_mla(s: Shape, **extra: Any) -> Any:
    arguments = {"dtype": BF16, "kv_lora_rank": 16 * s.heads, "qk_rope_head_dim": s.dim}
    return pools.MLATokenToKVPool(**{**arguments, **common(s), **extra})


def make_dsa(s: Shape, **extra: Any) -> Any:
    kpool = extra.get("index_kpool", 1)
    paged = Shape(**{**vars(s), "page_size": 64 * kpool})
    arguments = {"dtype": BF16, "kv_lora_rank": 128, "qk_rope_head_dim": s.dim}
    arguments |= {"index_head_dim": 128, "kv_cache_dim": 128 + s.dim, **common(paged), **extra}
    with get_parallel().override(attn_dcp_size=1, attn_dcp_rank=0):
        return pools.DSATokenToKVPool(**arguments)


def make_dsa_shared_topk(s: Shape) -> Any:
    return make_dsa(s, skip_topk_layers=[n % 2 == 1 for n in range(s.layers)])


def make_npu_mha(s: Shape, fia: str = "0", **extra: Any) -> Any:
    arguments = {"dtype": BF16, "head_num": s.heads, "head_dim": s.dim, **common(s), **extra}
    with ascend_pools() as npu, pytest.MonkeyPatch.context() as patch:
        patch.setenv("ASCEND_USE_FIA", fia)
        return npu.NPUMHATokenToKVPool(**arguments)


def make_npu_mla(s: Shape, nz: str = "0", dcp_size: int = 1, **extra: Any) -> Any:
    arguments = {"dtype": BF16, "kv_lora_rank": 16 * s.heads, "qk_rope_head_dim": 16}
    with ascend_pools(dcp_size) as npu, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SGLANG_USE_FIA_NZ", nz)
        return npu.NPUMLATokenToKVPool(**{**arguments, **common(s), **extra})


def make_npu_dsa(s: Shape) -> Any:
    ids = range(s.first_layer, s.first_layer + s.layers)
    return make_npu_mla(s, index_head_dim=128, indexer_layer_ids=list(ids)[::2])


def make_npu_packed(s: Shape) -> Any:
    packed = {"dtype": FP8, "kv_lora_rank": 128, "kv_cache_dim": 128 + 4 + 2 * 16}
    return make_npu_mla(s, index_head_dim=128, **packed)


# Name → (how SGLang builds it, the layout's tag, same bytes on all attention-TP ranks).
CASES: dict[str, tuple[Callable[[Shape], Any], str, bool]] = {
    "MHA": (make_mha, "nhd", False),
    "MHA Dv≠D": (lambda s: make_mha(s, v_head_dim=s.dim + 2), "nhd", False),
    "MHA fp8": (lambda s: make_mha(s, dtype=FP8), "nhd", False),
    "MHA fp8 on CPU": (
        lambda s: make_mha(s, dtype=FP8, quant_method=CPUFP8KVCacheMethod()),
        "nhd",
        False,
    ),
    "MHA HND": (make_hnd, "hnd", False),
    "MHA vectorized 5D": (make_vectorized, "vectorized_5d", False),
    "MLA": (make_mla, "mla_nhd", True),
    "MLA fp8": (lambda s: make_mla(s, dtype=FP8), "mla_nhd", True),
    "DSA": (make_dsa, "mla_nhd", True),
    "DSA shared top-k": (make_dsa_shared_topk, "mla_nhd", True),
    "DSA pooled index": (lambda s: make_dsa(s, index_kpool=2), "mla_nhd", True),
    "DSA packed fp8": (
        lambda s: make_dsa(s, dtype=FP8, kv_cache_dim=128 + 4 + 2 * s.dim),
        "mla_nhd",
        True,
    ),
    "NPU MHA": (make_npu_mha, "npu_paged_nhd", False),
    "NPU MHA FIA": (lambda s: make_npu_mha(s, "1"), "npu_paged_nhd", False),
    "NPU MHA FIA Dv≠D": (
        lambda s: make_npu_mha(s, "1", v_head_dim=s.dim + 2),
        "npu_paged_nhd",
        False,
    ),
    "NPU MLA": (make_npu_mla, "npu_mla_split", True),
    "NPU MLA NZ": (lambda s: make_npu_mla(s, nz="1"), "npu_mla_split_nz", True),
    "NPU DSA": (lambda s: make_npu_mla(s, index_head_dim=128), "npu_mla_split", True),
    "NPU DSA some layers": (make_npu_dsa, "npu_mla_split", True),
    "NPU DSA packed fp8": (make_npu_packed, "npu_mla_split", True),
}
every_pool = pytest.mark.parametrize("case", CASES)


def tensors_by_page(pool: Any) -> dict[tuple[int, str], Any]:
    """(layer, part) → SGLang's tensor as [pages, bytes of a page], by SGLang's own indices."""
    found: dict[tuple[int, str], Any] = {}
    pages = pool.size // pool.page_size + 1

    def add(part: str, buffers: Any, layers: Any = None) -> None:
        for i, buffer in enumerate(buffers):
            layer = layers[i] if layers is not None else pool.start_layer + i
            if buffer.numel():
                found[layer, part] = buffer.reshape(pages, -1).view(torch.uint8)

    if isinstance(pool, npu_pools.NPUMLATokenToKVPool):
        add("k", pool.k_buffer)
        add("v", pool.v_buffer)
        add("index_k", pool.index_k_buffer if pool.index_head_dim else (), pool.indexer_layer_ids)
        scales = pool.index_k_scale_buffer
        add("index_scale", () if scales is None else scales, pool.indexer_layer_ids)
    elif isinstance(pool, pools.MLATokenToKVPool):
        add("kv", pool.kv_buffer)
        add("index_k", getattr(pool, "index_k_with_scale_buffer", ()))
    else:
        add("k", pool.k_buffer)
        add("v", pool.v_buffer)
    return found


def view(address: int, length: int) -> Any:
    return np.ctypeslib.as_array((ctypes.c_ubyte * length).from_address(address))


def runs(layout: PageLayout, page: int) -> list[Any]:
    """The bytes of a page, span by span; page 0, which `addresses` refuses, by its definition."""
    if page == 0:
        return [view(span.base, span.length_bytes) for span in layout.spans]
    (row,) = layout.addresses(np.array([page]))
    return [view(int(a), n) for a, n in zip(row, layout.lengths_bytes, strict=True)]


def scramble(pool: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for tensor in tensors_by_page(pool).values():
        tensor.random_(0, 256, generator=generator)


def build(case: str, s: Shape) -> Any:
    return CASES[case][0](s)


def describe(pool: Any) -> PageLayout:
    return describe_pool(pool, pool.page_size)


class TestEverySupportedPool:
    @every_pool
    @some_shapes
    @given(s=shapes)
    def test_pages_cover_every_byte_exactly_once(self, case: str, s: Shape) -> None:
        pool = build(case, s)
        layout = describe(pool)
        owned = tensors_by_page(pool)
        assert set(owned) == {(span.layer, span.part) for span in layout.spans}
        for span in layout.spans:  # nothing outside SGLang's buffers may be touched below
            tensor = owned[span.layer, span.part]
            assert span.base == tensor.data_ptr()
            last = (layout.num_pages - 1) * span.stride_bytes + span.length_bytes
            assert last == tensor.nbytes
        for page in range(layout.num_pages):
            for run in runs(layout, page):
                run += 1
        assert all((tensor == 1).all() for tensor in owned.values())

    @every_pool
    @some_shapes
    @given(s=shapes)
    def test_a_page_is_what_sglang_keeps_under_its_slots(self, case: str, s: Shape) -> None:
        pool = build(case, s)
        layout = describe(pool)
        for page in range(layout.num_pages):
            for number, run in enumerate(runs(layout, page)):
                run[:] = (7 * page + number) % 256
        for number, span in enumerate(layout.spans):
            tensor = tensors_by_page(pool)[span.layer, span.part]
            for page in range(layout.num_pages):
                assert (tensor[page] == (7 * page + number) % 256).all()

    @every_pool
    @some_shapes
    @given(s=shapes, data=st.data())
    def test_a_page_moves_between_two_pools_and_touches_nothing_else(
        self, case: str, s: Shape, data: st.DataObject
    ) -> None:
        source, target = build(case, s), build(case, s)
        scramble(source, s.seed)
        scramble(target, s.seed + 1)
        before = {name: tensor.clone() for name, tensor in tensors_by_page(target).items()}
        here = data.draw(st.integers(1, s.pages))
        there = data.draw(st.integers(1, s.pages))
        stored = b"".join(run.tobytes() for run in runs(describe(source), here))
        assert len(stored) == describe(target).page_bytes
        at = 0
        for run in runs(describe(target), there):
            run[:] = np.frombuffer(stored, np.uint8, len(run), at)
            at += len(run)
        for name, tensor in tensors_by_page(target).items():
            expected = before[name]
            expected[there] = tensors_by_page(source)[name][here]
            assert torch.equal(tensor, expected)

    @every_pool
    def test_is_described_with_what_changes_its_bytes_and_no_address(self, case: str) -> None:
        one, other = build(case, shape()), build(case, shape(pages=9))
        assert describe(one).digest() == describe(other).digest()
        assert describe(one).spans[0].base != describe(other).spans[0].base
        fields = dict(describe(one).fields)
        assert fields["dtype"] == str(one.dtype)
        assert fields["store_dtype"] == str(one.store_dtype)
        assert fields["layers"] == (0, 1)

    @every_pool
    def test_has_its_tag_and_says_whether_ranks_hold_the_same(self, case: str) -> None:
        pool = build(case, shape())
        _, tag, replicated = CASES[case]
        assert describe(pool).tag == tag
        assert is_replicated(pool) is replicated

    @every_pool
    def test_must_have_the_page_size_that_the_cache_has(self, case: str) -> None:
        pool = build(case, shape())
        with pytest.raises(LayoutError, match="page size is"):
            describe_pool(pool, pool.page_size * 2)

    @pytest.mark.parametrize("case", [name for name in CASES if name != "MHA HND"])
    def test_must_agree_with_what_sglang_registers(self, case: str) -> None:
        pool = build(case, shape())
        addresses, lengths, page_bytes = pool.get_contiguous_buf_infos()
        for wrong in (
            ([addresses[0] + 1, *addresses[1:]], lengths, page_bytes),
            (addresses, lengths, [page_bytes[0] * 2, *page_bytes[1:]]),
            (addresses[1:], lengths[1:], page_bytes[1:]),
        ):
            pool.get_contiguous_buf_infos = lambda wrong=wrong: wrong
            with pytest.raises(LayoutError, match=f"{type(pool).__name__}.*only in ours"):
                describe(pool)

    @pytest.mark.parametrize("case", ["MHA", "MHA Dv≠D", "MLA", "NPU MHA", "NPU MHA FIA"])
    def test_may_end_with_a_page_that_is_not_whole(self, case: str) -> None:
        pool = build(case, shape(pages=2, spare=3))
        layout = describe(pool)
        assert layout.num_pages == 3
        (last,) = layout.addresses(np.array([2]))
        for address, span in zip(last, layout.spans, strict=True):
            buffers = pool.kv_buffer if span.part == "kv" else getattr(pool, f"{span.part}_buffer")
            buffer = buffers[span.layer]
            assert address + span.length_bytes <= buffer.data_ptr() + buffer.nbytes


class TestDigests:
    def test_differ_wherever_a_page_has_other_bytes(self) -> None:
        digests = {case: describe(build(case, shape(dim=8))).digest() for case in CASES}
        # FIA only changes how SGLang looks at the same memory.
        assert digests.pop("NPU MHA FIA") == digests["NPU MHA"]
        assert len(set(digests.values())) == len(digests)

    @pytest.mark.parametrize(
        "change",
        [{"heads": 1}, {"dim": 16}, {"layers": 3}, {"page_size": 8}, {"first_layer": 2}],
    )
    def test_change_with_the_shape(self, change: dict[str, int]) -> None:
        assert describe(make_mha(shape())).digest() != describe(make_mha(shape(**change))).digest()

    def test_tell_types_of_one_size_apart(self) -> None:
        dtypes = (BF16, torch.float16)
        assert len({describe(make_mha(shape(), dtype=dtype)).digest() for dtype in dtypes}) == 2
        dtypes = (FP8, torch.float8_e5m2)
        assert len({describe(make_mha(shape(), dtype=dtype)).digest() for dtype in dtypes}) == 2

    def test_tell_latent_and_rope_apart_where_their_sum_is_one(self) -> None:
        one = make_mla(shape(), kv_lora_rank=32, qk_rope_head_dim=16)
        other = make_mla(shape(), kv_lora_rank=16, qk_rope_head_dim=32)
        assert describe(one).digest() != describe(other).digest()


class TestTokensWrittenBySGLang:
    """SGLang's own writers: tokens of one page change that page's spans and nothing else."""

    @contextlib.contextmanager
    def changes_only(self, pool: Any, page: int) -> Iterator[None]:
        layout = describe(pool)
        scramble(pool, 3)
        before = [[run.copy() for run in runs(layout, p)] for p in range(layout.num_pages)]
        yield
        for p in range(layout.num_pages):
            same = [
                (span.part, bool((run == old).all()))
                for span, run, old in zip(layout.spans, runs(layout, p), before[p], strict=True)
            ]
            if p == page:
                assert not any(equal for part, equal in same if not part.startswith("index"))
            else:
                assert all(equal for _, equal in same)

    @pytest.mark.parametrize("fia", ["0", "1"])
    def test_through_the_ascend_gqa_pool(self, fia: str) -> None:
        pool = make_npu_mha(shape(), fia)
        slots = torch.arange(8, 12)
        with self.changes_only(pool, 2), ascend_pools():
            for layer_id in (0, 1):
                k, v = torch.randn(2, 4, 2, 8, dtype=BF16)
                pool.set_kv_buffer(SimpleNamespace(layer_id=layer_id), slots, k, v)

    @pytest.mark.parametrize("nz", ["0", "1"])
    def test_through_the_ascend_mla_pool(self, nz: str) -> None:
        pool = make_npu_mla(shape(), nz=nz)
        slots = torch.arange(8, 12)
        with self.changes_only(pool, 2), ascend_pools():
            for layer_id in (0, 1):
                latent, rope = torch.randn(4, 1, 32, dtype=BF16), torch.randn(4, 1, 16, dtype=BF16)
                pool.set_kv_buffer(SimpleNamespace(layer_id=layer_id), slots, latent, rope)

    def test_through_the_mla_pool(self) -> None:
        pool = make_mla(shape())
        slots = torch.arange(8, 12)
        with (
            self.changes_only(pool, 2),
            get_parallel().override(dcp_enabled=False, attn_dcp_size=1, attn_dcp_rank=0),
        ):
            for layer_id in (0, 1):
                rows = torch.randn(4, 1, 40, dtype=BF16)
                pool.set_kv_buffer(SimpleNamespace(layer_id=layer_id), slots, rows, rows)


def all_pool_classes() -> set[type]:
    found, new = set(), {pools.KVCache}
    while new:
        found |= new
        new = {sub for cls in new for sub in cls.__subclasses__()} - found
    return {cls for cls in found if cls.__module__.startswith("sglang.srt.")}


SUPPORTED = {
    pools.MHATokenToKVPool,
    pools.MLATokenToKVPool,
    pools.DSATokenToKVPool,
    npu_pools.NPUMHATokenToKVPool,
    npu_pools.NPUMLATokenToKVPool,
}
REFUSED = sorted(
    (cls for cls in all_pool_classes() - SUPPORTED if not inspect.isabstract(cls)),
    key=lambda cls: cls.__name__,
)


class TestOtherPools:
    @pytest.mark.parametrize("cls", REFUSED, ids=lambda cls: cls.__name__)
    def test_are_refused_by_name_and_with_advice(self, cls: type) -> None:
        pool = object.__new__(cls)  # refused for what it is, before anything of it is read
        with pytest.raises(LayoutError, match=rf"KV pool {cls.__name__} .*(drop|use|start) "):
            describe_pool(pool, 16)
        assert is_replicated(pool) is False

    def test_are_all_known_to_this_test(self) -> None:
        names = {cls.__name__ for cls in REFUSED}
        assert {"SWAKVPool", "HybridLinearKVPool", "DeepSeekV4TokenToKVPool"} <= names
        assert {"MHATokenToKVPoolFP4", "MLATokenToKVPoolFP4", "MHATokenToKVPoolMXFP8"} <= names
        assert {"LayerSplitDSATokenToKVPool", "HiSparseDSATokenToKVPool"} <= names
        assert len(names) >= 20

    @pytest.mark.parametrize(
        ("cls", "advice"),
        [
            (pools.MHATokenToKVPoolMXFP8, "use --kv-cache-dtype auto or fp8_e4m3"),
            (pools.MLATokenToKVPoolFP4, "use --kv-cache-dtype auto or fp8_e4m3"),
            (pools.HybridLinearKVPool, "start SGLang without the flag"),
        ],
    )
    def test_get_the_advice_that_fits(self, cls: type, advice: str) -> None:
        with pytest.raises(LayoutError, match=advice):
            describe_pool(object.__new__(cls), 16)

    def test_of_unknown_classes_are_refused_even_if_they_inherit_from_known_ones(self) -> None:
        class TweakedPool(pools.MHATokenToKVPool):
            pass

        pool = make_mha(shape())
        pool.__class__ = TweakedPool
        with pytest.raises(LayoutError, match="KV pool TweakedPool is not supported"):
            describe_pool(pool, 4)


class TestSupportedClassesInUnsupportedStates:
    def refused(self, pool: Any, why: str) -> None:
        with pytest.raises(LayoutError, match=rf"{type(pool).__name__}.*{why}"):
            describe(pool)

    def test_quantised_with_scales(self) -> None:
        pool = make_mha(shape(dim=16), quant_method=FP4MXBlock16KVCacheMethod())
        self.refused(pool, "keeps scales beside its KV: use --kv-cache-dtype")

    def test_latent_with_scales(self) -> None:
        pool = make_mla(shape())
        pool.kv_scale_buffer = [torch.zeros(1)] * 2
        self.refused(pool, "use --kv-cache-dtype")

    @pytest.mark.parametrize(
        ("name", "value", "why"),
        [
            ("layer_shard_enabled", True, "layers are sharded"),
            ("host_transfer_translate", len, "slots are virtual"),
            ("requires_physical_write_loc", True, "slots are virtual"),
        ],
    )
    def test_marked_by_sglang(self, name: str, value: Any, why: str) -> None:
        pool = make_mla(shape())
        setattr(pool, name, value)
        self.refused(pool, why)

    def test_unknown_layout_name(self) -> None:
        pool = make_mha(shape())
        pool.kv_cache_layout = "page_major"
        self.refused(pool, "unknown layout 'page_major'")

    def test_ascend_kv_on_the_host(self) -> None:
        with envs.SGLANG_NPU_ENABLE_SPARSE_KV_OFFLOAD.override(True):
            pool = make_npu_mla(shape(), index_head_dim=128)
        assert pool.k_buffer is None
        self.refused(pool, "unset SGLANG_NPU_ENABLE_SPARSE_KV_OFFLOAD")

    def test_ascend_slots_split_over_ranks(self) -> None:
        self.refused(make_npu_mla(shape(), dcp_size=2), "drop --dcp-size")

    def test_ascend_index_with_pages_of_its_own(self) -> None:
        self.refused(make_npu_mla(shape(), index_head_dim=128, index_page_size=8), "other pages")

    def test_indexer_rows_that_are_not_the_pools_pages(self) -> None:
        self.refused(make_dsa(shape(), index_buf_size=64 * 9), "the pool 4: drop --dcp-size")

    def test_indexer_state_per_request(self) -> None:
        pool = make_dsa(shape(), index_kpool=2, index_kpool_compress=True, max_running_requests=2)
        self.refused(pool, "keeps state per request")

    def test_buffers_with_gaps(self) -> None:
        pool = make_mla(shape())
        pool.kv_buffer = [torch.zeros(16, 1, 80, dtype=BF16)[..., ::2] for _ in range(2)]
        self.refused(pool, "not contiguous")

    def test_buffers_that_are_too_short(self) -> None:
        pool = make_mla(shape())
        pool.kv_buffer = [buffer[:8] for buffer in pool.kv_buffer]
        self.refused(pool, "has 2 pages, the pool 4")
