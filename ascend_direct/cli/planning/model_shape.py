# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""From a Hugging Face config.json to bytes of KV, numbers of weights and arithmetic per token.

Owns the formulas. What a rank holds of a *running* server is integration/pool_layout's; this reads
one file and needs no model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ascend_direct.errors import ConfigError

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
UNPLANNED = ("sliding_attention", "linear_attention", "mamba")


@dataclass(frozen=True)
class ModelShape:
    """A model as far as planning needs it.

    Attributes:
        kv_bytes_per_token: of the whole model, each byte once: what a pool keeps.
        kv_heads: 0 for MLA, whose latent every rank holds whole.
        weights: numbers in all weights.
        active_weights: numbers that a token is multiplied with.
        pair_flops: attention's arithmetic for one token over one token before it.
        weight_bytes: of all weights, at the file's dtype.
    """

    name: str
    kv_bytes_per_token: int
    kv_heads: int
    weights: int
    active_weights: int
    pair_flops: int
    weight_bytes: int

    @property
    def is_mla(self) -> bool:
        return self.kv_heads == 0

    def rank_kv_bytes_per_token(self, tp_size: int) -> int:
        """KV that each rank keeps of a token: its heads, or for MLA all of it.

        Raises:
            ConfigError: the heads do not divide over the ranks.
        """
        if self.is_mla:
            return self.kv_bytes_per_token
        if self.kv_heads % tp_size and tp_size % self.kv_heads:
            what = f"--tp {tp_size} does not divide {self.kv_heads} KV heads evenly"
            raise ConfigError([f"{what}: use a multiple or a divisor."])
        return self.kv_bytes_per_token // self.kv_heads * max(1, self.kv_heads // tp_size)


def read_shape(path: Path) -> ModelShape:
    """The shape in a config.json, or in that of a model folder.

    Raises:
        ConfigError: no such file, not JSON, or an architecture that is not planned.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError([f"--model-config {path}: {error}; give a model's folder."]) from None
    if not isinstance(config, dict):
        raise ConfigError([f"--model-config {path}: not a JSON object; give a model's folder."])
    name = config.get("_name_or_path") or (file.parent.name or file.name)
    inner = config.get("text_config")
    return shape_of(inner if isinstance(inner, dict) else config, str(name))


def shape_of(config: Mapping[str, Any], name: str) -> ModelShape:
    """The shape that a configuration describes.

    Raises:
        ConfigError: a size is missing, or layers of another kind are mixed in.
    """
    mixed = [kind for kind in config.get("layer_types") or () if kind in UNPLANNED]
    if mixed:
        why = "use a model whose layers are all full attention, as the cache itself needs"
        raise ConfigError([f"--model-config: layers of kind {mixed[0]} are not planned: {why}."])
    fields = _Fields(config)
    dtype = str(config.get("torch_dtype") or config.get("dtype") or "bfloat16")
    item_bytes = ITEM_BYTES.get(dtype.removeprefix("torch."), 2)
    layers = fields["num_hidden_layers"]
    if "kv_lora_rank" in config:
        kv_heads, attention, pair_flops = 0, _mla_weights(fields), _mla_pair_flops(fields)
        elements = fields["kv_lora_rank"] + fields["qk_rope_head_dim"]
        elements += config.get("index_head_dim") or 0
    else:
        heads, size = fields["num_attention_heads"], _head_dim(fields)
        kv_heads = config.get("num_key_value_heads") or heads
        attention = 2 * fields["hidden_size"] * size * (heads + kv_heads)
        pair_flops, elements = 4 * heads * size, 2 * kv_heads * size
    total, active = _mlp_weights(fields, layers)
    embedding = fields["vocab_size"] * fields["hidden_size"]
    untied = 1 if config.get("tie_word_embeddings") else 2
    weights = layers * attention + total + untied * embedding
    return ModelShape(
        name=name,
        kv_bytes_per_token=layers * elements * item_bytes,
        kv_heads=kv_heads,
        weights=weights,
        active_weights=layers * attention + active + embedding,
        pair_flops=layers * pair_flops,
        weight_bytes=weights * (1 if config.get("quantization_config") else item_bytes),
    )


class _Fields:
    """Positive whole numbers of a configuration, by name."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config

    def __getitem__(self, name: str) -> int:
        value = self._config.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            what = f"--model-config: {name} is {value!r}, not a positive number"
            raise ConfigError([f"{what}: config.json needs it."])
        return value

    def first(self, *names: str) -> int:
        """The first of these that is set; 0 where none is."""
        return next((self[name] for name in names if self._config.get(name)), 0)


def _head_dim(fields: _Fields) -> int:
    return fields.first("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]


def _mla_weights(fields: _Fields) -> int:
    heads, hidden = fields["num_attention_heads"], fields["hidden_size"]
    latent, rope = fields["kv_lora_rank"], fields["qk_rope_head_dim"]
    nope, value = fields["qk_nope_head_dim"], fields["v_head_dim"]
    narrow = fields.first("q_lora_rank")
    query = narrow * hidden if narrow else 0
    query += (narrow or hidden) * heads * (nope + rope)
    key_value = hidden * (latent + rope) + latent * heads * (nope + value)
    return query + key_value + heads * value * hidden


def _mla_pair_flops(fields: _Fields) -> int:
    key = fields["qk_nope_head_dim"] + fields["qk_rope_head_dim"]
    return 2 * fields["num_attention_heads"] * (key + fields["v_head_dim"])


def _mlp_weights(fields: _Fields, layers: int) -> tuple[int, int]:
    """(all, those a token meets), over all layers; routers are counted as met."""
    hidden = fields["hidden_size"]
    experts = fields.first("n_routed_experts", "num_experts", "num_local_experts")
    dense = 3 * hidden * fields.first("intermediate_size", "moe_intermediate_size")
    if not experts:
        return layers * dense, layers * dense
    dense_layers = min(fields.first("first_k_dense_replace"), layers)
    expert = 3 * hidden * fields.first("moe_intermediate_size", "intermediate_size")
    shared = expert * fields.first("n_shared_experts")
    shared += 3 * hidden * fields.first("shared_expert_intermediate_size")
    always = hidden * experts + shared
    chosen = fields["num_experts_per_tok"]
    rest = layers - dense_layers
    total = dense_layers * dense + rest * (always + experts * expert)
    return total, dense_layers * dense + rest * (always + chosen * expert)
