# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""A decode node's round: running answers are stored piece by piece, whatever becomes of them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from ascend_direct.integration.decode_offload import PEER_ROUNDS, DecodeOffload

from .audit import audit, check_pool, drain
from .instance import Instance
from .prompts import prompt
from .served import Phase, Served

PAGE_SIZE, STRIDE_TOKENS = 16, 32
TOKENS = prompt(100)


def linked(instance: Instance) -> DecodeOffload:
    return DecodeOffload(instance.tree, instance.controller)


def running(instance: Instance, tokens: list[int] = TOKENS) -> Served:
    served = instance.submit(tokens, new_tokens=500)
    assert instance.prefill(served)
    return served


def generate(instance: Instance, offload: DecodeOffload, served: list[Served], steps: int) -> None:
    """Decode steps, each after the round of a decode node."""
    for _ in range(steps):
        offload.store_running([one.req for one in served])
        for one in served:
            instance.decode(one)


@pytest.fixture
def node(make) -> Instance:
    return make(config={"decode_stride_tokens": STRIDE_TOKENS})


def test_a_running_answer_is_stored_each_time_it_has_grown_by_the_stride(node, make) -> None:
    served = running(node)
    generate(node, linked(node), [served], 2 * STRIDE_TOKENS + PAGE_SIZE)
    drain(node)
    held = len(node.store.pool)
    grown = len(TOKENS) // PAGE_SIZE + 2 * STRIDE_TOKENS // PAGE_SIZE
    assert grown <= held < (len(served.tokens) - 1) // PAGE_SIZE
    check_pool(node)
    audit(node)
    said = served.tokens
    node.abort(served)
    # Another server goes on where it was.
    reader = make().serve(said[: held * PAGE_SIZE + 1], new_tokens=1)
    assert reader.tiers["storage"] == held * PAGE_SIZE


def test_without_a_stride_an_answer_is_stored_when_it_ends(make) -> None:
    node = make(config={"decode_stride_tokens": 0})
    offload = DecodeOffload(node.tree, node.controller)
    scheduler = SimpleNamespace(
        disagg_decode_prealloc_queue=SimpleNamespace(kv_manager=prefill_nodes(1)),
        running_batch=SimpleNamespace(reqs=[]),
    )
    served = running(node)
    for _ in range(60):
        scheduler.running_batch.reqs = [served.req]
        offload.round(scheduler)
        node.decode(served)
    drain(node)
    assert len(node.store.pool) == len(TOKENS) // PAGE_SIZE
    node.abort(served)  # the tokens so far are its answer
    drain(node)
    assert len(node.store.pool) == (len(served.tokens) - 1) // PAGE_SIZE


def test_a_request_whose_tokens_another_gave_the_tree_keeps_its_slots_until_it_ends(node) -> None:
    first, second = running(node), running(node)
    generate(node, linked(node), [first, second], STRIDE_TOKENS - 4)
    mine = node.slots(second, 128)
    generate(node, linked(node), [first, second], 2 * STRIDE_TOKENS)
    assert first.tokens == second.tokens
    now = node.slots(second, 128)
    assert mine.tolist() == now.tolist(), "slots that a forward may be reading were given back"
    audit(node)
    for served in (first, second):
        node.abort(served)
    audit(node)


def test_a_request_that_was_passed_over_is_looked_at_once_a_stride(node, monkeypatch) -> None:
    first, second = running(node), running(node)
    looks, match = [], node.tree.match_prefix
    monkeypatch.setattr(node.tree, "match_prefix", lambda p: (looks.append(p), match(p))[1])
    generate(node, linked(node), [first, second], 4 * STRIDE_TOKENS)
    assert 2 * 3 <= len(looks) <= 2 * 4
    for served in (first, second):
        node.abort(served)


@pytest.mark.parametrize("end", ["abort", "retract"])
def test_slots_of_a_running_answer_are_not_used_again_while_they_are_being_stored(
    node, end
) -> None:
    node.store.faults["put"].hold()
    served = running(node)
    generate(node, linked(node), [served], 2 * STRIDE_TOKENS)
    assert node.store.faults["put"].entered.wait(5)
    being_stored = set(node.tree.tree_core.all_values_flatten().tolist())
    if end == "retract":
        node.retract(served)
        node.abort(served)
    else:
        node.abort(served)
    other = running(node, prompt(300, seed=4))
    assert not being_stored & set(node.slots(other, 300).tolist())
    audit(node)
    node.store.faults["put"].release()
    drain(node)
    check_pool(node)
    node.abort(other)
    assert served.phase is Phase.DONE


def prefill_nodes(*ranks: int) -> SimpleNamespace:
    """What SGLang's `CommonKVManager` knows on a decode node with one rank."""
    table = {str(n): SimpleNamespace(attn_tp_size=size) for n, size in enumerate(ranks)}
    return SimpleNamespace(attn_tp_size=1, prefill_info_table=table)


def rounds(node: Instance, *ranks: int) -> None:
    offload = linked(node)
    queue = SimpleNamespace(kv_manager=prefill_nodes(*ranks))
    batch = SimpleNamespace(reqs=[])
    for _ in range(PEER_ROUNDS + 1):
        offload.round(SimpleNamespace(disagg_decode_prealloc_queue=queue, running_batch=batch))


def stores(node: Instance) -> bool:
    node.serve(prompt(200, seed=9))
    drain(node)
    return len(node.store.pool) > 0


def test_a_prefill_node_of_as_many_ranks_is_fine(node) -> None:
    rounds(node, 1, 1)
    assert stores(node)


def test_pages_that_a_prefill_node_cannot_find_are_not_stored_and_the_log_says_so(
    node, caplog
) -> None:
    rounds(node, 1, 2)
    assert "2 attention ranks" in caplog.text
    assert "heads_per_object" in caplog.text
    assert not stores(node)


@pytest.mark.parametrize(
    "options", [{"kind": "mla"}, {"config": {"heads_per_object": 1}}], ids=["mla", "by heads"]
)
def test_pages_that_do_not_depend_on_the_ranks_are_stored_for_any_prefill_node(
    make, options
) -> None:
    node = make(**options)
    rounds(node, 4)
    assert stores(node)
