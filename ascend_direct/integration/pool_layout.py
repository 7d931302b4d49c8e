# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""SGLang's KV pools → `PageLayout`: which bytes of which buffer belong to a page.

Owns the reading of pool classes: what each one calls its buffers, whether a row is a token or a
page, and what else changes the bytes. Reads SGLang's own description (`get_device_pool_infos`) and
compares the result with what SGLang registers for disaggregation (`get_contiguous_buf_infos`).
Does not own the arithmetic (page_layout does), nor the server modes that make a pool unusable for
reasons that the pool cannot show (integration/mode).

SGLang is imported when a pool is described, not before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ascend_direct.errors import LayoutError
from ascend_direct.page_layout import PageLayout, Span

_CORE = "sglang.srt.mem_cache.memory_pool"
_NPU = "sglang.srt.hardware_backend.npu.memory_pool_npu"

# Exact classes: a subclass may keep its bytes anywhere, so an unknown one is refused.
_MHA = frozenset({f"{_CORE}.MHATokenToKVPool", f"{_NPU}.NPUMHATokenToKVPool"})
_DSA = f"{_CORE}.DSATokenToKVPool"
_MLA = frozenset({f"{_CORE}.MLATokenToKVPool", _DSA, f"{_NPU}.NPUMLATokenToKVPool"})
# KV methods whose buffers are K and V alone; all others keep scales or workspaces beside them.
_PLAIN_METHODS = frozenset({"unquantized", "cpu_fp8_e4m3"})

# Pools that an option chose: part of the class name → the option. All others belong to the model.
_OPTIONS = {
    "HiSparse": "drop --enable-hisparse",
    "FP4": "use --kv-cache-dtype auto or fp8_e4m3",
    "MXFP8": "use --kv-cache-dtype auto or fp8_e4m3",
    "LayerSplit": "drop --enable-dsa-cache-layer-split",
    "PageInterleave": "drop --enable-kv-cache-sharding",
    "PageMajor": "drop --enable-page-major-kv-layout",
    "Unified": "drop --enable-unified-memory",
    "NoOp": "drop --prefill-only-disable-kv-cache",
}
_NO_DCP = "drop --dcp-size"
_OF_THE_MODEL = "this model's KV cannot be cut into pages; start SGLang without the flag"


@dataclass(frozen=True)
class _Pool:
    """What all describers need of a pool."""

    pool: Any
    num_pages: int
    page_size_tokens: int
    layers: tuple[int, ...]
    buffers: dict[tuple[int, str], Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return type(self.pool).__name__

    def span(self, layer: int, part: str, buffer: Any, rows_per_page: int = 1) -> Span:
        """The pages of one layer's buffer; in every supported class they lie back to back.

        Args:
            rows_per_page: 1 where a row of the buffer is a page, the page size where it is a token.
        """
        what = f"{self.name}: {part} of layer {layer} {tuple(buffer.shape)}"
        if not buffer.is_contiguous():
            raise LayoutError(f"{what} is not contiguous")
        pages = buffer.shape[0] // rows_per_page
        # One page more than the allocator uses is rounding. More means its rows are not our pages
        # (context parallelism), unless the pool reserved addresses before it knew its size.
        most = pages if self.pool.post_capture_active else self.num_pages + 1
        if not self.num_pages <= pages <= most:
            raise LayoutError(f"{what} has {pages} pages, the pool {self.num_pages}: {_NO_DCP}")
        page_bytes = buffer.nbytes // buffer.shape[0] * rows_per_page
        self.buffers[layer, part] = buffer
        return Span(layer, part, buffer.data_ptr(), page_bytes, page_bytes)

    def paged(self, layer: int, part: str, buffer: Any) -> Span:
        """As `span`, for an Ascend buffer [pages, tokens, …]."""
        if buffer.shape[1] != self.page_size_tokens:
            raise LayoutError(f"{self.name}: {part} of layer {layer} has other pages: {_NO_DCP}")
        return self.span(layer, part, buffer)


def describe_pool(pool: Any, page_size_tokens: int) -> PageLayout:
    """Where the pages of `pool` lie.

    Call it once at start, before a layer-wise loader is registered with the pool: SGLang's own
    buffer listing waits for such a loader.

    Raises:
        LayoutError: the pool cannot be cut into pages; names the class and what to do.
    """
    return _describe(pool, page_size_tokens)[0]


def page_views(pool: Any, layout: PageLayout) -> list[Any]:
    """The memory of each span of `layout`, which must be `describe_pool`'s, as a tensor.

    Returns:
        Per span uint8 [pages, bytes], sharing memory with the pool.
    """
    buffers = _describe(pool, layout.page_size_tokens)[1]
    views = []
    for span in layout.spans:
        flat = buffers[span.layer, span.part].view(torch.uint8).reshape(-1)
        whole = layout.num_pages * span.length_bytes
        views.append(flat[:whole].view(layout.num_pages, span.length_bytes))
    return views


def _describe(pool: Any, page_size_tokens: int) -> tuple[PageLayout, dict[tuple[int, str], Any]]:
    _refuse_unsupported(pool, page_size_tokens)
    (info,) = pool.get_device_pool_infos()
    if info.buffer_info.scales is not None:
        raise LayoutError(f"KV pool {type(pool).__name__} is not supported: {_OPTIONS['FP4']}")
    # Slot 0's page is padding, whatever the size; a last page that is not whole is never used.
    num_pages = pool.size // page_size_tokens + 1
    known = _Pool(pool, num_pages, page_size_tokens, info.layer_ids)
    describe = _describe_mha if _class_of(pool) in _MHA else _describe_mla
    tag, spans, fields = describe(known, info.buffer_info)
    common = (
        ("pool", known.name),
        ("dtype", str(pool.dtype)),
        ("store_dtype", str(pool.store_dtype)),
        ("layers", known.layers),
    )
    _cross_check(pool, spans)
    layout = PageLayout(spans, num_pages, page_size_tokens, tag, (*common, *fields))
    return layout, known.buffers


def is_replicated(pool: Any) -> bool:
    """True where all attention-TP ranks hold the same bytes: MLA keeps one latent for all heads."""
    return _class_of(pool) in _MLA


def _class_of(pool: Any) -> str:
    return f"{type(pool).__module__}.{type(pool).__qualname__}"


def _refuse_unsupported(pool: Any, page_size_tokens: int) -> None:
    name = type(pool).__name__
    if _class_of(pool) not in _MHA | _MLA:
        advice = next((todo for part, todo in _OPTIONS.items() if part in name), _OF_THE_MODEL)
        raise LayoutError(f"KV pool {name} is not supported: {advice}")
    problems = []
    if pool.page_size != page_size_tokens:
        problems.append(f"its page size is {pool.page_size}, expected {page_size_tokens}")
    if pool.layer_shard_enabled:
        problems.append("its layers are sharded: drop --enable-dsa-cache-layer-split")
    if pool.host_transfer_translate is not None or pool.requires_physical_write_loc:
        problems.append("its slots are virtual: drop --enable-unified-memory")
    if getattr(pool, "dcp_size", 1) > 1:
        problems.append(f"its slots are split over ranks: {_NO_DCP}")
    if getattr(pool, "kpool_use_compress", False):
        problems.append("its indexer keeps state per request: disable index k-pool compression")
    method = getattr(getattr(pool, "quant_method", None), "name", "unquantized")
    if method not in _PLAIN_METHODS:
        problems.append(f"KV method {method!r} keeps scales beside its KV: {_OPTIONS['FP4']}")
    if problems:
        raise LayoutError(f"KV pool {name} is not supported: " + "; ".join(problems))


_Described = tuple[str, tuple[Span, ...], tuple[tuple[str, Any], ...]]


def _describe_mha(known: _Pool, info: Any) -> _Described:
    from sglang.srt.mem_cache.device_pool_info import KVBufferLayout

    layout = info.buffers.layout
    spans: list[Span] = []
    if info.transfer_buffers is not None:
        # Ascend. `k_buffer` may be views with a row per token (FIA); this is the memory itself.
        for part, buffer in zip("kv", info.transfer_buffers(), strict=True):
            spans += [known.paged(n, part, buffer[i]) for i, n in enumerate(known.layers)]
        tag = f"npu_{layout.value}"
    else:
        if layout.value != known.pool.kv_cache_layout:
            raise LayoutError(f"{known.name}: unknown layout {known.pool.kv_cache_layout!r}")
        rows_per_page = known.page_size_tokens if layout is KVBufferLayout.NHD else 1
        for part, buffers in (("k", info.buffers.k), ("v", info.buffers.v)):
            rows = zip(known.layers, buffers, strict=True)
            spans += [known.span(n, part, buffer, rows_per_page) for n, buffer in rows]
        tag = layout.value
    names = ("head_num", "head_dim", "v_head_dim")
    return tag, _by_layer(spans), tuple((name, getattr(info, name)) for name in names)


def _describe_mla(known: _Pool, info: Any) -> _Described:
    from sglang.srt.mem_cache.device_pool_info import MLASplitBuffers

    names = ("kv_lora_rank", "qk_rope_head_dim", "kv_cache_dim", "packed_fp8")
    fields: tuple[tuple[str, Any], ...] = tuple((name, getattr(info, name)) for name in names)
    if isinstance(info.buffers, MLASplitBuffers):
        spans = list(_split_spans(known, info.buffers))
        # NZ permutes 16-column tiles inside a page: same sizes, other bytes.
        tag = "npu_mla_split_nz" if known.pool.use_fia_nz else "npu_mla_split"
        fields += (("index_width", info.buffers.index_width), ("mlapo", _mla_preprocess()))
    else:
        latents = zip(known.layers, info.buffers, strict=True)
        spans = [known.span(n, "kv", rows, known.page_size_tokens) for n, rows in latents]
        tag = "mla_nhd"
        if _class_of(known.pool) == _DSA:
            # A row is a page: keys, then scales. Layers that reuse another's top-k have no rows.
            indexers = zip(known.layers, known.pool.index_k_with_scale_buffer, strict=True)
            spans += [known.span(n, "index_k", rows) for n, rows in indexers if len(rows)]
            fields += _indexer_fields(known.pool)
    return tag, _by_layer(spans), fields


def _split_spans(known: _Pool, buffers: Any) -> Iterator[Span]:
    if buffers.k is None or buffers.v is None:
        raise LayoutError(
            f"KV pool {known.name} is not supported: its KV is on the host; "
            "unset SGLANG_NPU_ENABLE_SPARSE_KV_OFFLOAD"
        )
    for i, layer in enumerate(known.layers):
        yield known.paged(layer, "k", buffers.k[i])
        if buffers.v_width:  # 0 where packed fp8 keeps the rope part inside k
            yield known.paged(layer, "v", buffers.v[i])
    if buffers.index_k is not None:
        for slot, i in enumerate(buffers.index_layer_indices):
            yield known.paged(known.layers[i], "index_k", buffers.index_k[slot])
            if buffers.index_scales is not None:
                yield known.paged(known.layers[i], "index_scale", buffers.index_scales[slot])


def _mla_preprocess() -> bool:
    """Whether Ascend's fused preprocessing is on: it may store the rotary half in another order."""
    from sglang.srt.environ import envs

    return bool(envs.SGLANG_NPU_USE_MLAPO.get())


def _indexer_fields(pool: Any) -> tuple[tuple[str, Any], ...]:
    from sglang.srt.layers.attention.dsa.utils import aiter_can_use_preshuffle_paged_mqa

    return (
        ("index_head_dim", pool.index_head_dim),
        ("index_page_size", pool.index_page_size),
        ("index_kpool", pool.index_kpool),
        ("index_preshuffled", aiter_can_use_preshuffle_paged_mqa()),
    )


def _by_layer(spans: list[Span]) -> tuple[Span, ...]:
    """Stored order: by layer, then part; a change needs a new SPAN_ORDER_VERSION."""
    return tuple(sorted(spans, key=lambda span: (span.layer, span.part)))


def _cross_check(pool: Any, spans: tuple[Span, ...]) -> None:
    """Compare with the buffers that SGLang itself moves page by page between servers."""
    if getattr(pool, "use_hnd", False):
        return  # SGLang cannot list HND buffers
    listed = _listed(pool.get_contiguous_buf_infos())
    if _class_of(pool) == _DSA:
        listed += _listed(pool.get_state_buf_infos())
    ours = Counter((span.base, span.length_bytes) for span in spans)
    if ours != listed:
        raise LayoutError(
            f"{type(pool).__name__}: the page layout does not match get_contiguous_buf_infos(): "
            f"only in ours {sorted((ours - listed).elements())}, "
            f"only in SGLang's {sorted((listed - ours).elements())}; "
            "this SGLang differs from 0.5.23"
        )


def _listed(infos: tuple[list[int], list[int], list[int]]) -> Counter[tuple[int, int]]:
    addresses, _, page_bytes = infos
    # SGLang lists an entry of 0 bytes for layers without rows.
    return Counter((a, n) for a, n in zip(addresses, page_bytes, strict=True) if n)


def page_numbers(slots: torch.Tensor, page_size: int) -> npt.NDArray[np.int64]:
    """Page of each run of `page_size` slots. Copies from the device: on transfer threads only.

    Raises:
        LayoutError: a run does not start a page.
    """
    first = slots[::page_size].to("cpu", torch.int64).numpy()
    if (first % page_size).any():
        raise LayoutError(f"slots {first.tolist()} do not start pages of {page_size}")
    pages: npt.NDArray[np.int64] = first // page_size
    return pages
