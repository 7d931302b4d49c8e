# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""What a request costs an instance: computing, attention over what is cached, loading, storing.

Owns the cost formulas, where their figures come from (a table, or a file of measured ones), and
from how many tokens on a load beats recomputing.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from ascend_direct.cli.planning.given import read_object
from ascend_direct.cli.planning.hardware import (
    ANSWER_MS_PER_TOKEN,
    HARDWARE,
    LOOKUP_MS,
    REQUEST_MS,
)
from ascend_direct.cli.planning.model_shape import ModelShape

# Length of the prompts that a given prefill rate is taken to have been measured with.
RATE_AT_TOKENS = 4096

NotNegative = Field(default=0.0, ge=0, allow_inf_nan=False)
Positive = Field(default=None, gt=0, allow_inf_nan=False)


class Costs(BaseModel):
    """Lines of one instance; the slowest rank's where there are several.

    A prompt of n computed and c cached tokens takes ``request + n · compute + c · cached +
    pairs · pair`` where pairs = n·c + n²/2, or (n+c)²/2 with `whole_attention`, which is how
    SGLang's torch_native attention works. A load of c tokens takes ``load_fixed + c · load``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = ""
    request_ms: float = NotNegative
    compute_us_per_token: float = NotNegative
    cached_us_per_token: float = NotNegative
    pair_ns: float = NotNegative
    whole_attention: bool = False
    lookup_ms: float = NotNegative
    load_fixed_ms: float = NotNegative
    load_us_per_token: float = NotNegative
    store_fixed_ms: float = NotNegative
    store_us_per_token: float = NotNegative
    answer_ms_per_token: float = NotNegative
    # Of all instances' loads together; 0 where the pool gives each what it can take.
    pool_us_per_token: float = NotNegative

    def compute_s(self, computed_tokens: float, cached_tokens: float) -> float:
        """Prefill of a prompt, without `request_ms`."""
        n, c = computed_tokens, cached_tokens
        pairs = (n + c) * (n + c) / 2 if self.whole_attention else n * (c + n / 2)
        per_token_us = n * self.compute_us_per_token + c * self.cached_us_per_token
        return 1e-6 * per_token_us + 1e-9 * self.pair_ns * pairs

    def load_s(self, tokens: float) -> float:
        """A load by itself."""
        return 1e-3 * self.load_fixed_ms + 1e-6 * self.load_us_per_token * tokens

    def store_s(self, tokens: float) -> float:
        """From the end of prefill until others can find the pages."""
        return 1e-3 * self.store_fixed_ms + 1e-6 * self.store_us_per_token * tokens

    def saved_s(self, prompt_tokens: int, loaded_tokens: int) -> float:
        """What a prompt gains if this much of it is loaded instead of computed."""
        whole_s = self.compute_s(prompt_tokens, 0)
        rest_s = self.compute_s(prompt_tokens - loaded_tokens, loaded_tokens)
        return whole_s - rest_s - self.load_s(loaded_tokens) - 1e-3 * self.lookup_ms

    def break_even_tokens(self, prompt_tokens: int, page_tokens: int) -> int | None:
        """Fewest tokens, in whole pages, whose load makes such a prompt faster; None: none do.

        At least one token of a prompt is always computed.
        """
        for tokens in range(page_tokens, prompt_tokens, page_tokens):
            if self.saved_s(prompt_tokens, tokens) > 0:
                return tokens
        return None


class CostOptions(Costs):
    """`--costs`: any figure of Costs, or in more usual units."""

    prefill_tokens_per_s: float | None = Positive
    load_gb_per_s: float | None = Positive
    store_gb_per_s: float | None = Positive
    pool_gb_per_s: float | None = Positive


def table_costs(shape: ModelShape, tp_size: int, hardware: str) -> Costs:
    """Costs by the table of `hardware`: an estimate, rung E0."""
    table = HARDWARE[hardware]
    flops = tp_size * table.flops * table.utilisation
    share_bytes: float = shape.rank_kv_bytes_per_token(tp_size)
    exchange_s = 0.0
    if shape.is_mla and tp_size > 1 and table.exchange_bytes_per_s:
        exchange_s = share_bytes / table.exchange_bytes_per_s
        share_bytes /= tp_size
    stored_bytes = shape.kv_bytes_per_token / tp_size if shape.is_mla else share_bytes
    return Costs(
        source=f"table values of {table.title} (E0): charts of MemCache, peak × "
        f"{table.utilisation:g}; not measured by this project",
        request_ms=REQUEST_MS,
        compute_us_per_token=1e6 * 2 * shape.active_weights / flops,
        pair_ns=1e9 * shape.pair_flops / flops,
        lookup_ms=LOOKUP_MS,
        load_fixed_ms=table.load.fixed_ms,
        load_us_per_token=1e6 * (share_bytes / table.load.bytes_per_s + exchange_s),
        store_fixed_ms=table.store.fixed_ms,
        store_us_per_token=1e6 * stored_bytes / table.store.bytes_per_s,
        answer_ms_per_token=ANSWER_MS_PER_TOKEN,
    )


def wire_bytes_per_token(shape: ModelShape, tp_size: int, hardware: str) -> int:
    """What leaves the pool when a server loads a token: each rank's share, or what all read."""
    if shape.is_mla and HARDWARE[hardware].exchange_bytes_per_s:
        return shape.kv_bytes_per_token
    return shape.rank_kv_bytes_per_token(tp_size) * tp_size


def read_costs(
    source: str, known: Costs, rank_bytes_per_token: int, wire_bytes_per_token: int
) -> Costs:
    """`--costs` (JSON or @file) over `known`.

    Args:
        rank_bytes_per_token: for the rates of loads and stores in GB/s, which are a rank's.
        wire_bytes_per_token: for that of the whole pool.

    Raises:
        ConfigError: not JSON, an unknown name or a bad value.
    """
    given = read_object(CostOptions, "--costs", source)
    names = given.model_fields_set
    values: dict[str, Any] = given.model_dump(include=names & set(Costs.model_fields))
    if given.prefill_tokens_per_s:
        seconds = 1 / given.prefill_tokens_per_s
        attention_s = 1e-9 * values.get("pair_ns", known.pair_ns) * RATE_AT_TOKENS / 2
        values["compute_us_per_token"] = 1e6 * max(seconds - attention_s, 0.0)
    for name, rate, size in (
        ("load", given.load_gb_per_s, rank_bytes_per_token),
        ("store", given.store_gb_per_s, rank_bytes_per_token),
        ("pool", given.pool_gb_per_s, wire_bytes_per_token),
    ):
        if rate:
            values[f"{name}_us_per_token"] = size / rate / 1e3
    values.setdefault("source", f"{', '.join(sorted(names))} as given; the rest {known.source}")
    return known.model_copy(update=values)
