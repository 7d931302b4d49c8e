# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Which model a server computes KV with: fields for the page namespace. Standard library only.

Owns the identity of weights (`identify_model`) and which SGLang options, besides the KV pool's own
shape, make equal tokens give other KV (`model_fields`). Reads files, never SGLang.

An option belongs here when it changes the *function* that is computed. Options that only round
differently (attention backend, GEMM kernels, TF32, CUDA graphs) do not: SGLang itself mixes their
results inside one cache. What is left, and why:

| option | why |
| --- | --- |
| model_path, revision, download_dir | the weights, as identity; paths themselves do not count |
| load_format | which files of a directory are the weights |
| tp_size, random_seed | only with load_format=dummy: they choose the random weights |
| model_loader_extra_config | may name further weights (adapters, shards) |
| weight_version | the operator's own mark for weights that were changed in place |
| model_impl, model_config_parser, json_model_override_args | the architecture and its constants, rope included |
| context_length | reaches the model's configuration; some models derive positions from it |
| is_embedding | other attention masks |
| dtype, quantization, modelopt_quant, quantize_and_serve | weights and activations as computed |
| kv_cache_dtype, quantization_param_path | KV dtype, and the content of its scales |
| lora_paths | SGLang hashes an adapter's name and path, not what is in it |
| mm_process_config, image_processor_backend, disable_fast_image_processor, trust_mm_content_hashes | what an image becomes; with trusted hashes the page hash does not show it |
| enable_quant_communications, enable_w4a4_mxfp4_megamoe, flashinfer_mxfp4_moe_precision, deepep_dispatcher_output_dtype, flashinfer_a2a_dispatch_type, kt_method | lossy activations |
"""  # noqa: E501 (a table)

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ascend_direct.errors import ConfigError

logger = logging.getLogger(__name__)

_VALUES = (
    *("load_format", "model_loader_extra_config", "weight_version", "model_impl"),
    *("model_config_parser", "json_model_override_args", "context_length", "is_embedding"),
    *("dtype", "quantization", "modelopt_quant", "quantize_and_serve", "kv_cache_dtype"),
    *("mm_process_config", "image_processor_backend", "disable_fast_image_processor"),
    *("trust_mm_content_hashes", "enable_quant_communications", "enable_w4a4_mxfp4_megamoe"),
    *("flashinfer_mxfp4_moe_precision", "deepep_dispatcher_output_dtype"),
    *("flashinfer_a2a_dispatch_type", "kt_method"),
)
_DUMMY_VALUES = ("tp_size", "random_seed")
# Options that bring weights from elsewhere than model_path: nothing here can tell those apart.
_OPAQUE = (
    *("custom_weight_loader", "modelopt_checkpoint_restore_path", "rl_quant_profile"),
    *("decrypted_config_file", "kt_weight_path", "checkpoint_engine_wait_weights_before_ready"),
)
_OPAQUE_FORMATS = frozenset(
    {"remote", "remote_instance", "flash_rl", "private", "expert_pack", "presharded"}
)
# What `model_fields` wants to know: attributes of SGLang's ServerArgs.
MODEL_FIELDS = (
    *("model_path", "revision", "download_dir", "quantization_param_path", "lora_paths"),
    *("weight_cache_mode", *_VALUES, *_DUMMY_VALUES, *_OPAQUE),
)

_WEIGHT_SUFFIXES = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf"})
# Files that change which tokens are computed (the page hash has those), or nothing.
_NEUTRAL = re.compile(
    r"tokenizer.*|vocab\.json|merges.*|added_tokens\.json|special_tokens_map\.json"
    r"|generation_config\.json|chat_template.*|trainer_state\.json|all_results\.json"
)
_NEUTRAL_CONFIG = frozenset({"_name_or_path", "_commit_hash", "transformers_version"})
_SNAPSHOT = re.compile(r"models--([^/]+)/snapshots/([0-9a-f]{40})$")
_REPOSITORY = re.compile(r"[\w.\-]+/[\w.\-]+")

_READ_BYTES = 4 << 20
_CHUNK_BYTES = 64 << 20
_WHOLE_BYTES = 16 << 20  # `sampled` reads files up to this size whole
_HEADER_BYTES = 4 << 20
_WINDOWS, _WINDOW_BYTES = 256, 64 << 10
_PROGRESS_S = 5.0
_RACY_NS = 2_000_000_000  # a file as fresh as this may change again within one mtime tick
_MAX_CACHED = 4096


def model_fields(
    args: Mapping[str, Any], model_id: str = "", weights_fingerprint: str = "full"
) -> dict[str, str]:
    """The model's part of the page namespace; see the table above.

    Args:
        args: SGLang's options by name, `MODEL_FIELDS` of them; absent counts as unset.
        model_id: the operator's name of the weights; trusted, nothing is read then.
        weights_fingerprint: ``full`` or ``sampled``.

    Raises:
        ConfigError: the weights cannot be told apart; set model_id.
    """
    load_format = args.get("load_format") or "auto"
    opaque = [name for name in _OPAQUE if args.get(name)]
    opaque += [f"load_format={load_format}"] * (load_format in _OPAQUE_FORMATS)
    opaque += ["weight_cache_mode=client"] * (args.get("weight_cache_mode") == "client")
    if opaque and not model_id:
        raise _unknown(str(args.get("model_path")), f"{', '.join(opaque)} brings other weights")
    mode = "config" if load_format == "dummy" else weights_fingerprint
    where = (args.get("revision"), args.get("download_dir"))
    fields = {"model": identify_model(str(args.get("model_path")), model_id, mode, *where)}
    for name in (*_VALUES, *(_DUMMY_VALUES if load_format == "dummy" else ())):
        fields[name] = _canonical(args.get(name))
    if scales := args.get("quantization_param_path"):
        fields["quantization_param_path"] = _fingerprint(scales, "full")
    adapters = {_adapter(item, args["lora_paths"]) for item in args.get("lora_paths") or ()}
    for adapter in sorted(adapters):
        fields[f"lora:{adapter}"] = identify_model(adapter, "", weights_fingerprint)
    return fields


def identify_model(
    model_path: str,
    model_id: str = "",
    weights_fingerprint: str = "full",
    revision: str | None = None,
    download_dir: str | None = None,
) -> str:
    """A name that equal weights share: ``id:…``, ``hf:org/name@commit`` or ``weights:full:…``.

    Raises:
        ConfigError: no such model on this machine.
    """
    if model_id:
        return f"id:{model_id}"
    for path in (os.path.abspath(model_path), os.path.realpath(model_path)):
        if snapshot := _SNAPSHOT.search(path):
            return f"hf:{snapshot[1].replace('--', '/')}@{snapshot[2]}"
    if os.path.exists(model_path):
        return f"weights:{weights_fingerprint}:{_fingerprint(model_path, weights_fingerprint)}"
    if not _REPOSITORY.fullmatch(model_path):
        raise _unknown(model_path, "no such file, directory or Hugging Face repository")
    return f"hf:{model_path}@{_commit(model_path, revision or 'main', download_dir)}"


def _commit(repository: str, revision: str, download_dir: str | None) -> str:
    """The commit that SGLang's downloader has put, or will look for, in the Hugging Face cache."""
    if re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    get = os.environ.get
    home = get("HF_HOME") or f"{get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    hub = download_dir or get("HF_HUB_CACHE") or get("HUGGINGFACE_HUB_CACHE") or f"{home}/hub"
    folder = Path(hub).expanduser() / f"models--{repository.replace('/', '--')}"
    try:
        return (folder / "refs" / revision).read_text().strip()
    except OSError as error:
        raise _unknown(repository, f"not in the Hugging Face cache: {error}") from error


def _fingerprint(path: str, mode: str) -> str:
    """Digest of a file, or of all weight and configuration files of a directory."""
    root = Path(path)
    try:
        files = sorted(root.iterdir()) if root.is_dir() else []
        others = [f for f in files if f.suffix in {".json", ".py"} and f.is_file()]
        weights = [f for f in files if f.suffix in _WEIGHT_SUFFIXES and f.is_file()]
        weights = [] if mode == "config" else weights if root.is_dir() else [root]
        parts = [(f.name, _config(f)) for f in others if not _NEUTRAL.fullmatch(f.name)]
        digests = _digests(weights, mode)
    except (OSError, ValueError) as error:
        raise _unknown(path, str(error)) from error
    if not weights and mode != "config":
        raise _unknown(path, "no weight files (*.safetensors, *.bin, *.pt, *.gguf) in it")
    # The name of a lone file is a path like any other: it does not count.
    parts += [(f.name if f != root else "", digests[f]) for f in weights]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=20).hexdigest()


def _config(file: Path) -> str:
    raw = file.read_bytes()
    with contextlib.suppress(ValueError):  # not JSON after all: its bytes count
        content = json.loads(raw) if file.suffix == ".json" else None
        if isinstance(content, dict):
            return _canonical({k: v for k, v in content.items() if k not in _NEUTRAL_CONFIG})
    return hashlib.blake2b(raw, digest_size=20).hexdigest()


def _digests(files: list[Path], mode: str) -> dict[Path, str]:
    """Digest of each file, from the cache where size, time and inode are as they were."""
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    cache_file = cache_home / "ascend_direct" / "fingerprints.json"
    cached = _read_cache(cache_file)
    keys = {file: _stat_key(file, mode) for file in files}
    if missing := [file for file in files if keys[file] not in cached]:
        digests = _hash_files(missing, mode)
        if changed := [file.name for file in missing if _stat_key(file, mode) != keys[file]]:
            raise OSError(f"{', '.join(changed)} changed while being read")
        settled_ns = time.time_ns() - _RACY_NS
        kept = {keys[f]: digests[f] for f in missing if f.stat().st_mtime_ns < settled_ns}
        _write_cache(cache_file, _read_cache(cache_file) | kept)
        cached |= {keys[file]: digest for file, digest in digests.items()}
    return {file: cached[keys[file]] for file in files}


def _stat_key(file: Path, mode: str) -> str:
    stat = file.stat()
    parts = (mode, os.path.realpath(file), stat.st_size, stat.st_mtime_ns, stat.st_ino)
    return "|".join(str(part) for part in parts)


def _read_cache(cache_file: Path) -> dict[str, str]:
    try:
        content = json.loads(cache_file.read_bytes())
        return {k: v for k, v in content.items() if re.fullmatch(r"[0-9a-f]{40}", v)}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}  # absent or damaged: everything is read again


def _write_cache(cache_file: Path, content: dict[str, str]) -> None:
    newest = dict(list(content.items())[-_MAX_CACHED:])
    temporary = cache_file.with_name(f"{cache_file.name}.{os.getpid()}")
    try:
        cache_file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(newest))
        os.replace(temporary, cache_file)
    except OSError as error:
        logger.info("weight fingerprints are not kept for the next start: %s", error)


def _hash_files(files: list[Path], mode: str) -> dict[Path, str]:
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1), "fingerprint") as threads:
        windows = {file: _windows(file.stat().st_size, mode) for file in files}
        jobs = {f: [threads.submit(_hash_window, f, *w) for w in windows[f]] for f in files}
        total = sum(length for file in files for _, length in windows[file])
        done, reported = 0, time.monotonic()
        digests = {}
        try:
            for file in files:
                whole = hashlib.blake2b(repr((mode, windows[file])).encode(), digest_size=20)
                for (_, length), job in zip(windows[file], jobs[file], strict=True):
                    whole.update(job.result())
                    done += length
                    if time.monotonic() - reported > _PROGRESS_S:
                        reported = time.monotonic()
                        logger.info("weights fingerprint: %d/%d MiB", done >> 20, total >> 20)
                digests[file] = whole.hexdigest()
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
        return digests


def _windows(size: int, mode: str) -> list[tuple[int, int]]:
    """(offset, bytes) of what is read of a file."""
    if mode == "full" or size <= _WHOLE_BYTES:
        return [(at, min(_CHUNK_BYTES, size - at)) for at in range(0, size, _CHUNK_BYTES)]
    last = size - _WINDOW_BYTES
    spread = [(last * i // (_WINDOWS - 1), _WINDOW_BYTES) for i in range(_WINDOWS)]
    return [(0, _HEADER_BYTES), *spread]


def _hash_window(file: Path, offset: int, length: int) -> bytes:
    digest = hashlib.blake2b(digest_size=20)
    with file.open("rb", buffering=0) as handle:
        handle.seek(offset)
        while length:
            data = handle.read(min(length, _READ_BYTES))
            if not data:
                raise OSError(f"{file.name} ends too early")
            digest.update(data)
            length -= len(data)
    return digest.digest()


def _adapter(item: Any, lora_paths: Any) -> str:
    """Path of an adapter, in any of the forms that SGLang accepts."""
    if isinstance(lora_paths, Mapping):
        return str(lora_paths[item])
    if isinstance(item, Mapping):
        return str(item["lora_path"])
    return str(item).split("=", 1)[-1] if isinstance(item, str) else str(item.lora_path)


def _canonical(value: Any) -> str:
    """One text per value; options that hold JSON count by content, not by spelling."""
    if isinstance(value, str) and value[:1] in ("{", "["):
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    return json.dumps(value, sort_keys=True, default=str)


def _unknown(model: str, why: str) -> ConfigError:
    todo = "name them with model_id in --hierarchical-cache-direct-config"
    return ConfigError([f"cannot tell which weights {model!r} are ({why}); {todo}."])
