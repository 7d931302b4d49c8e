# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Small random-weight models, made on the spot: nothing is downloaded.

Owns four architectures (`gqa` = Qwen3, `llama`, `mla` = DeepSeek-V2 with dense layers, `mlamoe`
with experts), their sizes and a byte-level tokenizer that encodes any text and decodes any id.
The same arguments always give the same bytes. Does not start SGLang, does not train anything.

Attention is made sharp and loud on purpose: with plain random weights a long prompt averages out,
and the answer to a prompt whose cached KV is wrong would look right.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

KINDS = ("gqa", "llama", "mla", "mlamoe")
DTYPES = ("float32", "bfloat16", "float16")
STAMP_NAME = "made_by.json"
RECIPE_VERSION = 1  # raise it when the bytes made from the same arguments change
VOCAB_SIZE = 1024
FIRST_PLAIN_TOKEN = 3  # 0..2 are <pad>, <s>, </s>

# Standard deviation of the attention logits, and the gain that lets what attention says outweigh a
# token's own embedding. Measured at 3.5k tokens, gqa: one wrong page of 54 changes the first four
# answer tokens of 16 prompts in 16 (2.4 and 4: 4 in 16). Pages swapped whole stay invisible to any
# model, attention does not ask for their order: only a comparison of bytes can see that.
ATTENTION_SHARPNESS = 3.5
ATTENTION_GAIN = 10.0


class ModelError(RuntimeError):
    """A model cannot be made as asked; the message says what to change."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Everything that decides the size of a model; MLA fields are ignored by gqa and llama."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    kv_lora_rank: int
    q_lora_rank: int
    rope_dim: int
    nope_dim: int
    v_dim: int
    experts: int
    expert_intermediate: int


SHAPES = {
    # Starts fast and answers in milliseconds: the size for tests.
    "tiny": Shape(4, 256, 512, 8, 2, 32, 64, 128, 32, 32, 32, 8, 128),
    # Wide layers, few heads: CPU attention recomputes every query of a prompt even on a cache hit,
    # so the share of attention in a prefill is what a hit cannot save.
    "demo": Shape(4, 1024, 1536, 4, 2, 64, 128, 256, 32, 32, 64, 4, 768),
    # Much KV, for what moving it costs: 32 KiB per token, as a rank of Qwen3-32B has at TP 8 (64
    # layers of one KV head of 128, K and V, 2 bytes). Here in 8 layers of 4 heads and 4 bytes.
    "wide": Shape(8, 512, 1024, 4, 4, 128, 512, 256, 64, 64, 64, 4, 512),
}
# The CPU has no fused kernel for MLA attention: it costs about four times as much per head.
MLA_SHAPES = SHAPES | {
    "demo": replace(SHAPES["demo"], layers=3, heads=2, intermediate=2048, expert_intermediate=1024),
    # DeepSeek's latent of 512 and 64, 9 KiB per token.
    "wide": replace(SHAPES["wide"], layers=4, heads=1),
}


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The arguments a model is made from; written beside the weights as its stamp."""

    kind: str
    dtype: str
    shape: Shape
    seed: int
    max_positions: int
    recipe_version: int = RECIPE_VERSION

    @property
    def is_mla(self) -> bool:
        return self.kind in ("mla", "mlamoe")

    def stamp(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"


class _Weights:
    """Named tensors drawn in one fixed order from one seeded generator."""

    def __init__(self, spec: ModelSpec) -> None:
        import torch

        self._torch = torch
        self._generator = torch.Generator().manual_seed(spec.seed)
        self._dtype = getattr(torch, spec.dtype)
        self.tensors: dict[str, torch.Tensor] = {}

    def linear(self, name: str, rows: int, columns: int, *, gain: float = 1.0) -> None:
        drawn = self._torch.randn(rows, columns, generator=self._generator)
        self.tensors[f"{name}.weight"] = (drawn * (gain / math.sqrt(columns))).to(self._dtype)

    def norm(self, name: str, size: int, *, value: float = 1.0) -> None:
        self.tensors[f"{name}.weight"] = self._torch.full((size,), value, dtype=self._dtype)

    def mlp(self, name: str, hidden: int, intermediate: int) -> None:
        self.linear(f"{name}.gate_proj", intermediate, hidden)
        self.linear(f"{name}.up_proj", intermediate, hidden)
        self.linear(f"{name}.down_proj", hidden, intermediate)


def _plain_attention(w: _Weights, name: str, shape: Shape, *, normalised: bool) -> None:
    q_size, kv_size = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    # Qwen3 normalises q and k, which would undo a gain in the projection.
    w.linear(f"{name}.q_proj", q_size, shape.hidden, gain=1 if normalised else ATTENTION_SHARPNESS)
    w.linear(f"{name}.k_proj", kv_size, shape.hidden)
    w.linear(f"{name}.v_proj", kv_size, shape.hidden)
    w.linear(f"{name}.o_proj", shape.hidden, q_size, gain=ATTENTION_GAIN)
    if normalised:
        w.norm(f"{name}.q_norm", shape.head_dim, value=ATTENTION_SHARPNESS)
        w.norm(f"{name}.k_norm", shape.head_dim)


def _latent_attention(w: _Weights, name: str, shape: Shape) -> None:
    latent, qk_dim = shape.kv_lora_rank, shape.nope_dim + shape.rope_dim
    w.linear(f"{name}.q_a_proj", shape.q_lora_rank, shape.hidden)
    w.norm(f"{name}.q_a_layernorm", shape.q_lora_rank)
    q_rows = shape.heads * qk_dim
    w.linear(f"{name}.q_b_proj", q_rows, shape.q_lora_rank, gain=ATTENTION_SHARPNESS)
    w.linear(f"{name}.kv_a_proj_with_mqa", latent + shape.rope_dim, shape.hidden)
    w.norm(f"{name}.kv_a_layernorm", latent)
    w.linear(f"{name}.kv_b_proj", shape.heads * (shape.nope_dim + shape.v_dim), latent)
    w.linear(f"{name}.o_proj", shape.hidden, shape.heads * shape.v_dim, gain=ATTENTION_GAIN)


def _experts(w: _Weights, name: str, shape: Shape) -> None:
    w.linear(f"{name}.gate", shape.experts, shape.hidden)
    for expert in range(shape.experts):
        w.mlp(f"{name}.experts.{expert}", shape.hidden, shape.expert_intermediate)
    w.mlp(f"{name}.shared_experts", shape.hidden, shape.expert_intermediate)


def _weights(spec: ModelSpec) -> dict[str, torch.Tensor]:
    w, shape = _Weights(spec), spec.shape
    w.linear("model.embed_tokens", VOCAB_SIZE, shape.hidden, gain=math.sqrt(shape.hidden))
    w.linear("lm_head", VOCAB_SIZE, shape.hidden)
    w.norm("model.norm", shape.hidden)
    for layer in range(shape.layers):
        name = f"model.layers.{layer}"
        if spec.is_mla:
            _latent_attention(w, f"{name}.self_attn", shape)
        else:
            _plain_attention(w, f"{name}.self_attn", shape, normalised=spec.kind == "gqa")
        if spec.kind == "mlamoe" and layer >= 1:
            _experts(w, f"{name}.mlp", shape)
        else:
            w.mlp(f"{name}.mlp", shape.hidden, shape.intermediate)
        w.norm(f"{name}.input_layernorm", shape.hidden)
        w.norm(f"{name}.post_attention_layernorm", shape.hidden)
    return w.tensors


def _common_config(spec: ModelSpec) -> dict[str, Any]:
    shape = spec.shape
    return {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": spec.max_positions,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "torch_dtype": spec.dtype,
    }


def _mla_config(spec: ModelSpec) -> dict[str, Any]:
    shape = spec.shape
    return {
        "model_type": "deepseek_v2",
        "architectures": ["DeepseekV2ForCausalLM"],
        "num_key_value_heads": shape.heads,
        "head_dim": shape.rope_dim,
        "kv_lora_rank": shape.kv_lora_rank,
        "q_lora_rank": shape.q_lora_rank,
        "qk_rope_head_dim": shape.rope_dim,
        "qk_nope_head_dim": shape.nope_dim,
        "v_head_dim": shape.v_dim,
        # SGLang wants a number of experts even where every layer is dense.
        "first_k_dense_replace": 1 if spec.kind == "mlamoe" else shape.layers,
        "moe_layer_freq": 1,
        "n_routed_experts": shape.experts,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": shape.expert_intermediate,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        # Without YaRN, SGLang's CPU path for DeepSeek has no rotary embedding to call.
        "rope_scaling": {
            "type": "yarn",
            "factor": 4.0,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
            "original_max_position_embeddings": max(spec.max_positions // 4, 1),
            "beta_fast": 32,
            "beta_slow": 1,
        },
    }


def _config(spec: ModelSpec) -> dict[str, Any]:
    config = _common_config(spec)
    if spec.is_mla:
        return config | _mla_config(spec)
    if spec.kind == "gqa":
        family = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
        return config | family | {"use_sliding_window": False}
    family = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    return config | family | {"mlp_bias": False}


def _write_tokenizer(folder: Path, max_positions: int) -> None:
    """Byte-level BPE without merges: one token per byte; the other ids decode as `<w17>`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokens = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [f"<w{index}>" for index in range(VOCAB_SIZE - len(tokens))]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "model_max_length": max_positions,
        "clean_up_tokenization_spaces": False,
        "chat_template": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")


def _spec(
    kind: str,
    size: str,
    dtype: str,
    layers: int | None,
    hidden: int | None,
    seed: int,
    max_positions: int,
) -> ModelSpec:
    for value, allowed, what in ((kind, KINDS, "kind"), (dtype, DTYPES, "dtype")):
        if value not in allowed:
            raise ModelError(f"unknown {what} {value!r}: use one of {', '.join(allowed)}")
    if size not in SHAPES:
        raise ModelError(f"unknown size {size!r}: use one of {', '.join(SHAPES)}")
    shape = (MLA_SHAPES if kind.startswith("mla") else SHAPES)[size]
    if layers is not None:
        shape = replace(shape, layers=layers)
    if hidden is not None:
        ratio = shape.intermediate / shape.hidden
        shape = replace(shape, hidden=hidden, intermediate=round(hidden * ratio))
    if shape.layers < (2 if kind == "mlamoe" else 1):
        raise ModelError(f"{shape.layers} layers are too few: mlamoe needs 2, the others 1")
    if shape.hidden < 32 or shape.hidden % 32:
        raise ModelError(f"hidden size {shape.hidden} is not a positive multiple of 32")
    if max_positions < 1:
        raise ModelError(f"max positions {max_positions} is not positive")
    return ModelSpec(kind, dtype, shape, seed, max_positions)


def _write_model(folder: Path, spec: ModelSpec) -> None:
    from safetensors.torch import save_file

    (folder / "config.json").write_text(json.dumps(_config(spec), indent=1) + "\n")
    _write_tokenizer(folder, spec.max_positions)
    save_file(_weights(spec), str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / STAMP_NAME).write_text(spec.stamp())


def _is_current(folder: Path, spec: ModelSpec) -> bool:
    try:
        return (folder / STAMP_NAME).read_text() == spec.stamp()
    except OSError:
        return False


def _put_in_place(made: Path, out: Path, spec: ModelSpec) -> None:
    """Rename `made` to `out`; a reader sees the old model, no model or the new one, never a mix."""
    retired = made.with_name(made.name + ".old")
    try:
        if out.exists():
            out.rename(retired)
        made.rename(out)
    except OSError as error:
        # Another process may have made the same model between our two renames.
        if not _is_current(out, spec):
            if retired.exists() and not out.exists():
                retired.rename(out)
            raise ModelError(f"cannot put the model at {out}: {error}") from error
    finally:
        shutil.rmtree(retired, ignore_errors=True)


def make_model(
    out: Path,
    kind: str,
    *,
    size: str = "tiny",
    dtype: str = "float32",
    layers: int | None = None,
    hidden: int | None = None,
    seed: int = 0,
    max_positions: int = 16384,
) -> Path:
    """Make the model at `out` unless exactly this one is there already; return `out`.

    Raises:
        ModelError: an argument is wrong, or `out` holds something this module did not make.
    """
    spec = _spec(kind, size, dtype, layers, hidden, seed, max_positions)
    if _is_current(out, spec):
        return out
    if out.exists() and not (out / STAMP_NAME).exists() and (out.is_file() or any(out.iterdir())):
        raise ModelError(f"{out} exists and is not a model made here: choose another path")
    out.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    made.chmod(0o755)
    try:
        _write_model(made, spec)
        _put_in_place(made, out, spec)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return out
