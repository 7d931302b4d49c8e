# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Each server mode that the cache cannot serve is refused, by its own reason, with all others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ascend_direct.integration import mode

from .launching import command_line, resolved

SPARSE_OFFLOAD = "SGLANG_NPU_ENABLE_SPARSE_KV_OFFLOAD"

# (field of SGLang's arguments, value, what the reason names); one or more per conflict.
CASES: list[tuple[str, Any, str]] = [
    ("disable_radix_cache", True, "--disable-radix-cache"),
    ("radix_cache_backend", "lmcache", "--radix-cache-backend"),
    ("enable_hierarchical_cache", True, "--enable-hierarchical-cache"),
    ("hicache_storage_backend", "file", "--hicache-storage-backend"),
    ("enable_lmcache", True, "--enable-lmcache"),
    ("enable_flexkv", True, "--enable-flexkv"),
    ("enable_linker_mla_dedup", True, "--enable-linker-mla-dedup"),
    ("pp_size", 2, "--pp-size"),
    ("dcp_size", 2, "--dcp-size"),
    ("disaggregation_mode", "decode", "--disaggregation-decode-enable-radix-cache"),
    ("enable_pd_role_switch", True, "--enable-pd-role-switch"),
    ("encoder_only", True, "--encoder-only"),
    ("use_ray", True, "--use-ray"),
    ("disaggregation_decode_retraction_backup", "host_pool", "host_pool"),
    ("disaggregation_decode_enable_offload_kvcache", True, "offload-kvcache"),
    ("enable_hisparse", True, "--enable-hisparse"),
    ("enable_kv_cache_sharding", True, "--enable-kv-cache-sharding"),
    ("enable_unified_memory", True, "--enable-unified-memory"),
    ("enable_page_major_kv_layout", True, "--enable-page-major-kv-layout"),
    ("speculative_algorithm", "EAGLE", "--speculative-algorithm"),
    ("dllm_algorithm", "LowConfidence", "--dllm-algorithm"),
    ("enable_session_radix_cache", True, "--enable-session-radix-cache"),
    ("enable_memory_saver", True, "--enable-memory-saver"),
    ("prefill_only_disable_kv_cache", True, "--prefill-only-disable-kv-cache"),
    ("kv_cache_dtype", "fp4_e2m1", "--kv-cache-dtype"),
    ("kv_cache_dtype", "mxfp8", "--kv-cache-dtype"),
    ("kv_cache_dtype", "int8", "--kv-cache-dtype"),
]
FINE: list[tuple[str, Any]] = [
    ("kv_cache_dtype", "fp8_e4m3"),
    ("kv_cache_dtype", "bfloat16"),
    ("disaggregation_mode", "prefill"),
    ("disaggregation_decode_retraction_backup", "cpu_tensor"),
    ("disaggregation_decode_retraction_backup", "none"),
    ("radix_cache_backend", "ascend_direct"),
    ("tp_size", 8),
    ("dp_size", 2),
    ("enable_lora", True),
    ("chunked_prefill_size", 512),
]


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    """SGLang's own arguments of a server without any of these modes."""
    args = resolved(command_line())
    return {name: getattr(args, name) for name in type(args).__struct_fields__}


@pytest.fixture(autouse=True)
def _no_offload(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SPARSE_OFFLOAD, raising=False)


def refused(plain: dict[str, Any], **changed: Any) -> list[str]:
    unknown = set(changed) - set(plain)
    assert not unknown, f"SGLang has no such arguments: {unknown}"
    return mode.conflicts(SimpleNamespace(**{**plain, **changed}))


def test_a_plain_server_is_not_refused(plain) -> None:
    assert refused(plain) == []


@pytest.mark.parametrize(("field", "value", "named"), CASES)
def test_a_mode_that_cannot_work_is_refused_by_name(plain, field, value, named) -> None:
    (reason,) = refused(plain, **{field: value})
    assert named in reason


@pytest.mark.parametrize("value", ["1", "true", "ON"])
def test_sparse_offload_of_kv_is_refused(plain, monkeypatch, value) -> None:
    monkeypatch.setenv(SPARSE_OFFLOAD, value)
    (reason,) = refused(plain)
    assert SPARSE_OFFLOAD in reason
    monkeypatch.setenv(SPARSE_OFFLOAD, "0")
    assert refused(plain) == []


@pytest.mark.parametrize(("field", "value"), FINE)
def test_a_mode_that_works_is_not_refused(plain, field, value) -> None:
    assert refused(plain, **{field: value}) == []


def test_all_reasons_come_at_once_and_every_conflict_has_a_case(plain, monkeypatch) -> None:
    monkeypatch.setenv(SPARSE_OFFLOAD, "1")
    reasons = refused(plain, **{field: value for field, value, _ in CASES})
    assert len(reasons) == len(mode._CONFLICTS)
    assert len(set(reasons)) == len(reasons)
