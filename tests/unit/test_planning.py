# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""The simulation, costs, traces and model shapes behind `ascend-direct plan`."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ascend_direct.cli.planning import forecast
from ascend_direct.cli.planning.costs import Costs, read_costs, table_costs, wire_bytes_per_token
from ascend_direct.cli.planning.model_shape import shape_of
from ascend_direct.cli.planning.routing import POLICIES
from ascend_direct.cli.planning.simulation import Fleet, Outcome, Simulation
from ascend_direct.cli.planning.synthetic import Synthetic, generate
from ascend_direct.cli.planning.traces import Request, Trace, copies, read_trace
from ascend_direct.errors import ConfigError
from tests.unit.test_cli_plan import QWEN3_32B

PAGE = 16
COSTS = Costs(
    request_ms=1,
    compute_us_per_token=100,
    cached_us_per_token=5,
    pair_ns=10,
    lookup_ms=0.5,
    load_fixed_ms=2,
    load_us_per_token=10,
    store_fixed_ms=1,
    store_us_per_token=5,
    answer_ms_per_token=1,
)
DEEPSEEK_R1 = {
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "vocab_size": 129280,
    "torch_dtype": "bfloat16",
    "quantization_config": {"quant_method": "fp8"},
}


def request(arrival_s: float, units: tuple[int, ...], rest: int = 1, **fields) -> Request:
    """A prompt of whole pages and `rest` tokens."""
    return Request(arrival_s, len(units) * PAGE + rest, 0, units, PAGE, **fields)


def trace_of(*requests: Request) -> Trace:
    return Trace("test", requests, PAGE, PAGE)


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    """Prompts that branch: a unit's name is all of its prefix, as in a real trace."""
    names: dict[tuple[int, ...], int] = {}
    found, now_s = [], 0.0
    for _ in range(draw(st.integers(1, 30))):
        now_s += draw(st.floats(0, 0.2))
        steps = draw(st.lists(st.integers(0, 2), min_size=0, max_size=8))
        units = tuple(
            names.setdefault(tuple(steps[: n + 1]), len(names)) for n in range(len(steps))
        )
        found.append(request(now_s, units, draw(st.integers(1, PAGE - 1))))
    return trace_of(*found)


fleets = st.builds(
    Fleet,
    instances=st.integers(1, 4),
    device_tokens=st.integers(9 * PAGE, 40 * PAGE),
    pool_tokens=st.integers(0, 60 * PAGE),
    min_load_tokens=st.integers(1, 4 * PAGE),
    batch_tokens=st.integers(1, 200),
    policy=st.sampled_from(POLICIES),
)


def run(trace: Trace, fleet: Fleet, costs: Costs = COSTS) -> Outcome:
    return Simulation(trace, fleet, costs).run()


# ---- invariants -------------------------------------------------------------------------------


@given(trace=traces(), fleet=fleets)
@settings(max_examples=150, deadline=None)
def test_tokens_are_conserved_and_nothing_is_found_that_was_not_there(trace, fleet) -> None:
    simulation = Simulation(trace, fleet, COSTS)
    outcome = simulation.run()
    ideal, _ = forecast.reusable_tokens(trace, math.inf)
    assert sum(outcome.device_tokens) + sum(outcome.loaded_tokens) <= ideal
    for place, asked in enumerate(trace.requests):
        cached = outcome.device_tokens[place] + outcome.loaded_tokens[place]
        assert 0 <= cached < asked.prompt_tokens
        assert cached % PAGE == 0
        assert outcome.loaded_tokens[place] == 0 or (
            outcome.loaded_tokens[place] >= fleet.min_load_tokens
        )
        least_s = COSTS.compute_s(asked.prompt_tokens - cached, cached)
        assert outcome.ttft_s[place] >= least_s
    assert sum(tokens for _, tokens in outcome.loads) == sum(outcome.loaded_tokens)
    assert sum(tokens for _, tokens in outcome.stores) == outcome.stored_tokens
    held = sum(simulation.pool.held.values())
    assert held == outcome.stored_tokens - outcome.pool_evicted_tokens


@given(trace=traces(), fleet=fleets)
@settings(max_examples=150, deadline=None)
def test_no_tier_holds_more_than_it_can(trace, fleet) -> None:
    simulation = Simulation(trace, fleet, COSTS)
    outcome = simulation.run()
    assert outcome.pool_peak_tokens <= fleet.pool_tokens
    for device in simulation.devices:
        assert device.peak_tokens <= fleet.device_tokens
        assert sum(device.held.values()) == device.used_tokens
    if not fleet.pool_tokens:
        assert not any(outcome.loaded_tokens)


@given(trace=traces(), small=st.integers(1, 40), more=st.integers(0, 40))
@settings(max_examples=150, deadline=None)
def test_a_larger_cache_of_the_same_order_never_has_less(trace, small, more) -> None:
    """LRU keeps what a smaller one keeps, so long as both are used alike."""
    less, _ = forecast.reusable_tokens(trace, small * PAGE)
    assert less <= forecast.reusable_tokens(trace, (small + more) * PAGE)[0]


@given(trace=traces(), fleet=fleets)
@settings(max_examples=100, deadline=None)
def test_an_unbounded_pool_behind_slow_requests_finds_all_that_can_be_reused(trace, fleet) -> None:
    far = [r._replace(arrival_s=100.0 * n) for n, r in enumerate(trace.requests)]
    trace = replace(trace, requests=far)
    fleet = replace(fleet, pool_tokens=10**9, min_load_tokens=1)
    outcome = run(trace, fleet)
    found = sum(outcome.device_tokens) + sum(outcome.loaded_tokens)
    assert found == forecast.reusable_tokens(trace, math.inf)[0]


@given(trace=traces(), fleet=fleets)
@settings(max_examples=50, deadline=None)
def test_the_same_question_has_the_same_answer(trace, fleet) -> None:
    assert run(trace, fleet) == run(trace, fleet)


# ---- what happens when ------------------------------------------------------------------------


def test_one_request_takes_what_the_costs_say() -> None:
    alone = trace_of(request(0, (1, 2, 3)))
    outcome = run(alone, Fleet(1, 10_000))
    assert outcome.ttft_s[0] == pytest.approx(1e-3 + COSTS.compute_s(49, 0))


def test_a_second_instance_loads_what_the_first_computed_and_stored() -> None:
    units = tuple(range(20))
    fleet = Fleet(2, 10_000, pool_tokens=10_000)
    outcome = run(trace_of(request(0, units), request(10, units)), fleet)
    assert list(outcome.loaded_tokens) == [0, 320]
    expected_s = 1e-3 + 0.5e-3 + COSTS.load_s(320) + COSTS.compute_s(1, 320)
    assert outcome.ttft_s[1] == pytest.approx(expected_s)


def test_before_it_is_stored_nothing_is_found() -> None:
    units = tuple(range(20))
    early = COSTS.compute_s(321, 0) + COSTS.store_s(321) / 2
    fleet = Fleet(2, 10_000, pool_tokens=10_000)
    outcome = run(trace_of(request(0, units), request(early, units)), fleet)
    assert list(outcome.loaded_tokens) == [0, 0]


def test_at_least_one_token_of_a_prompt_is_computed() -> None:
    whole = Request(0, 3 * PAGE, 0, (1, 2, 3), PAGE)
    outcome = run(trace_of(whole, whole._replace(arrival_s=9)), Fleet(1, 10_000))
    assert list(outcome.device_tokens) == [0, 2 * PAGE]


def test_requests_that_wait_are_computed_in_one_batch() -> None:
    asked = [request(0, (1,)), request(0.001, (2,)), request(0.001, (3,))]
    together = run(trace_of(*asked), Fleet(1, 10_000))
    assert together.ttft_s[1] == pytest.approx(together.ttft_s[2])
    apart = run(trace_of(*asked), Fleet(1, 10_000, batch_tokens=20))
    assert apart.ttft_s[1] < apart.ttft_s[2]


def test_a_full_device_gives_up_what_was_used_longest_ago() -> None:
    asked = [request(n, (10 * n, 10 * n + 1)) for n in range(3)]
    asked += [request(10, (20, 21)), request(11, (0, 1))]
    outcome = run(trace_of(*asked), Fleet(1, 4 * PAGE))
    assert list(outcome.device_tokens) == [0, 0, 0, 2 * PAGE, 0]


def test_the_end_of_a_prefix_goes_before_its_beginning() -> None:
    asked = [request(0, (1, 2, 3)), request(1, (7,)), request(2, (1, 2, 3))]
    outcome = run(trace_of(*asked), Fleet(1, 3 * PAGE))
    assert outcome.device_tokens[2] == 2 * PAGE


def test_a_full_pool_makes_more_room_than_it_needs() -> None:
    fleet = Fleet(1, 10_000, pool_tokens=10 * PAGE)
    simulation = Simulation(trace_of(*(request(n, (n,)) for n in range(10))), fleet, COSTS)
    outcome = simulation.run()
    assert outcome.pool_peak_tokens == 9 * PAGE
    assert outcome.pool_evicted_tokens == 2 * PAGE


def test_a_pool_with_a_limit_makes_loads_of_all_instances_wait_for_each_other() -> None:
    units = tuple(range(20))
    asked = [request(0, units), *(request(10, units) for _ in range(3))]
    fleet = Fleet(4, 10_000, pool_tokens=10_000)
    slow = COSTS.model_copy(update={"pool_us_per_token": 1000.0})
    outcome = run(trace_of(*asked), fleet, slow)
    waits = [b - a for a, b in zip(outcome.ttft_s[1:], outcome.ttft_s[2:], strict=False)]
    assert waits == pytest.approx([0.32, 0.32])


def test_answers_can_be_reused_once_they_are_complete() -> None:
    first = request(0, (1,), answer_units=(2, 3))._replace(answer_tokens=2 * PAGE)
    outcome = run(trace_of(first, request(5, (1, 2, 3))), Fleet(1, 10_000))
    assert outcome.device_tokens[1] == 3 * PAGE
    outcome = run(trace_of(first, request(0.03, (1, 2, 3))), Fleet(1, 10_000))
    assert outcome.device_tokens[1] == PAGE


def test_a_conversations_beginning_is_not_given_up_before_its_answer() -> None:
    first = request(0, (1, 2), answer_units=(3, 4))
    outcome = run(trace_of(first, request(5, (7, 8)), request(9, (1, 2, 3, 4))), Fleet(1, 5 * PAGE))
    assert list(outcome.device_tokens) == [0, 0, 3 * PAGE]


@pytest.mark.parametrize("policy", POLICIES)
def test_all_instances_are_used(policy: str) -> None:
    simulation = Simulation(
        trace_of(*(request(0.001 * n, (n,)) for n in range(40))),
        Fleet(4, 10_000, policy=policy),
        COSTS,
    )
    simulation.run()
    assert all(device.held for device in simulation.devices)


def test_the_prefix_policy_keeps_a_conversation_where_it_was() -> None:
    turns = [request(n, tuple(range(100 * (n % 3), 100 * (n % 3) + n // 3 + 1))) for n in range(12)]
    spread = run(trace_of(*turns), Fleet(4, 10_000))
    kept = run(trace_of(*turns), Fleet(4, 10_000, policy="prefix"))
    assert sum(kept.device_tokens) > sum(spread.device_tokens)
    assert sum(kept.device_tokens) == forecast.reusable_tokens(trace_of(*turns), math.inf)[0]


# ---- costs ------------------------------------------------------------------------------------


def test_break_even_is_where_the_load_costs_what_it_saves() -> None:
    line = Costs(compute_us_per_token=100, load_fixed_ms=4, load_us_per_token=20)
    # 4 ms + 20 µs · n < 100 µs · n from n = 50 on.
    assert line.break_even_tokens(1000, 1) == 51
    assert line.break_even_tokens(1000, PAGE) == 64
    assert line.break_even_tokens(50, 1) is None
    assert line.saved_s(1000, 100) == pytest.approx(4e-3)


def test_attention_over_a_cached_prefix_is_not_free() -> None:
    causal = Costs(pair_ns=1000)
    assert causal.compute_s(10, 100) == pytest.approx(1e-6 * (1000 + 50))
    whole = Costs(pair_ns=1000, whole_attention=True)
    assert whole.compute_s(10, 100) == whole.compute_s(110, 0) == pytest.approx(1e-6 * 110**2 / 2)


def test_tables_give_what_their_sources_say() -> None:
    r1 = shape_of(DEEPSEEK_R1, "r1")
    costs = table_costs(r1, 1, "a3")
    # 40 objects of 8.57 MiB took 7.8 ms on A3, 15.9 ms on A2: facts of 128-token pages of R1.
    assert 1e3 * costs.load_s(40 * 128) == pytest.approx(7.8, rel=0.05)
    assert 1e3 * table_costs(r1, 1, "a2").load_s(40 * 128) == pytest.approx(15.9, rel=0.05)
    assert "E0" in costs.source


def test_mla_ranks_read_a_share_each_where_an_exchange_is_known() -> None:
    r1 = shape_of(DEEPSEEK_R1, "r1")
    assert wire_bytes_per_token(r1, 16, "a3") == 70_272
    assert wire_bytes_per_token(r1, 8, "a2") == 8 * 70_272
    qwen = shape_of(QWEN3_32B, "qwen")
    assert wire_bytes_per_token(qwen, 4, "a3") == 262_144


def test_a_given_prefill_rate_is_that_of_prompts_of_4096_tokens() -> None:
    known = Costs(pair_ns=1.0)
    costs = read_costs('{"prefill_tokens_per_s": 10000}', known, 1, 1)
    assert costs.compute_s(4096, 0) == pytest.approx(0.4096)


# ---- models -----------------------------------------------------------------------------------


def test_sizes_of_published_models_are_right() -> None:
    qwen, r1 = shape_of(QWEN3_32B, "qwen"), shape_of(DEEPSEEK_R1, "r1")
    assert qwen.kv_bytes_per_token == 262_144
    assert qwen.weights == pytest.approx(32.8e9, rel=0.01)
    assert [qwen.rank_kv_bytes_per_token(tp) for tp in (1, 2, 8, 16)] == [
        262_144,
        131_072,
        32_768,
        32_768,
    ]
    assert r1.kv_bytes_per_token == r1.rank_kv_bytes_per_token(16) == 70_272
    assert r1.weights == pytest.approx(671e9, rel=0.01)
    assert r1.active_weights == pytest.approx(37e9, rel=0.03)
    assert r1.weight_bytes == r1.weights


def test_the_index_of_sparse_attention_is_counted() -> None:
    dsa = shape_of({**DEEPSEEK_R1, "index_head_dim": 128}, "dsa")
    assert dsa.kv_bytes_per_token == 61 * (512 + 64 + 128) * 2


# ---- traces -----------------------------------------------------------------------------------


def line(timestamp: float, tokens: int, ids: list[int], **fields) -> str:
    told = {"timestamp": timestamp, "input_length": tokens, "output_length": 0, "hash_ids": ids}
    return json.dumps({**told, **fields})


def read(tmp_path: Path, lines: list[str], block: int = 512, page: int = 128, **kw) -> Trace:
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(lines))
    return read_trace(path, block, page, kw.get("in_seconds", False))


def test_blocks_of_a_trace_become_runs_of_whole_pages(tmp_path: Path) -> None:
    (one,) = read(tmp_path, [line(0, 1300, [7, 8, 9])]).requests
    assert (one.units, one.last_tokens) == ((7, 8, 9), 256)
    (one,) = read(tmp_path, [line(0, 1100, [7, 8, 9])]).requests
    assert (one.units, one.last_tokens) == ((7, 8), 512)
    (one,) = read(tmp_path, [line(0, 100, list(range(7)))], block=16, page=64).requests
    assert (one.units, one.last_tokens) == ((3,), 64)


def test_an_answers_blocks_may_be_given(tmp_path: Path) -> None:
    given_ids = line(0, 1100, [1, 2, 3], output_length=1000, answer_hash_ids=[4, 5])
    (one,) = read(tmp_path, [given_ids]).requests
    assert one.answer_units == (4, 5)
    assert one.units == (1, 2)


def test_timestamps_are_milliseconds_in_any_order_and_ticks_are_spread(tmp_path: Path) -> None:
    lines = [line(6000, 600, [1, 2]), line(3000, 600, [3, 4]), line(3000, 600, [5, 6])]
    trace = read(tmp_path, lines)
    assert [r.arrival_s for r in trace.requests] == [3.0, 4.5, 6.0]
    assert trace.notes == ("2 requests shared a timestamp: spread up to the next one",)
    seconds = read(tmp_path, lines[:2], in_seconds=True)
    assert [r.arrival_s for r in seconds.requests] == [3000, 6000]


def test_copies_share_only_what_they_should() -> None:
    trace = Trace(
        "test",
        [request(n, (0, 100 + n)) for n in range(10)],
        PAGE,
        PAGE,
        frozenset({0}),
    )
    three = copies(trace, 3, 1000)
    assert len({r.units[0] for r in three.requests}) == 1
    assert len({r.units[1] for r in three.requests}) == len(three.requests)
    arrivals = [r.arrival_s for r in three.requests]
    assert arrivals == sorted(arrivals)
    assert len(copies(trace, 3, 6).requests) <= 6


def test_a_synthetic_trace_follows_its_parameters_and_its_seed() -> None:
    given_ = Synthetic(requests=5000, requests_per_s=10, think_s=2, turns=3)
    trace = generate(given_, 128)
    assert trace.requests == generate(given_, 128).requests
    assert trace.requests != generate(given_.model_copy(update={"seed": 2}), 128).requests
    assert len(trace.requests) == 5000
    assert 5000 / trace.span_s == pytest.approx(10, rel=0.1)
    assert all(r.prompt_tokens <= given_.longest_prompt_tokens for r in trace.requests)
    assert all(len(r.units) == r.prompt_tokens // 128 for r in trace.requests)
    heads = {r.units[0] for r in trace.requests}
    assert len(heads) == given_.system_prompts


def test_a_wrong_shape_lists_the_field() -> None:
    with pytest.raises(ConfigError, match="num_hidden_layers is 0"):
        shape_of({"num_hidden_layers": 0}, "x")
