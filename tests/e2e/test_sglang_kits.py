# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""SGLang's own server-level test kits against a server with the flag on.

Token ids of the kits go up to 31,999; here they are folded into the tiny model's vocabulary.
Not used, because they cannot pass against this server, whatever the cache does:
  * prefix_cache_branching_kit states Mamba semantics: the second request must *not* hit.
  * gsm8k in unified_radix_cache_kit, eval and lm_eval kits need a trained model and a download.
  * kl_divergence_kit takes its prompts from LongBench, a download; unified_radix_cache_kit makes
    the same comparison on prompts one gives it, and is used.
  * abort_timeout_kit's timeout mixins need servers of their own with SGLANG_REQ_*_TIMEOUT; what
    they show (no crash) is test_aborts' subject.
  * kits of other features: speculative decoding, streaming sessions, LoRA, grammars, VLM.
"""

from __future__ import annotations

import functools
import importlib
import json
import random
import sys
import types
import unittest
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from sglang_cpu.models import FIRST_PLAIN_TOKEN, VOCAB_SIZE
from two_instances.cluster import Cluster

from .farm import Farm

pytestmark = pytest.mark.parametrize("cluster", ["page64"], indirect=True)


def folded(token_ids: Sequence[int]) -> list[int]:
    """Any ids, as ids of the tiny model's vocabulary; those that are stay as they are."""
    return [
        token if token < VOCAB_SIZE else FIRST_PLAIN_TOKEN + token % 1000 for token in token_ids
    ]


@pytest.fixture(scope="module")
def kits() -> types.SimpleNamespace:
    """SGLang's modules, imported when the first test needs them: they bring all of SGLang.

    Their helpers import Hugging Face's `datasets`, which only kits that download use.
    """
    names = {
        "abort": "kits.abort_timeout_kit",
        "cache_hit": "kits.cache_hit_kit",
        "radix": "kits.radix_cache_server_kit",
        "unified": "kits.unified_radix_cache_kit",
        "multiturn": "kl_multiturn_utils",
        "single_turn": "kl_test_utils",
    }
    absent = types.ModuleType("datasets")
    absent.load_dataset = None  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setenv("SGLANG_USE_CPU_ENGINE", "1")
        patch.setitem(sys.modules, "datasets", absent)
        modules = {k: importlib.import_module(f"sglang.test.{v}") for k, v in names.items()}
    return types.SimpleNamespace(**modules)


@pytest.fixture
def small_vocabulary(kits: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kits' requests carry ids this model has."""
    plain = kits.single_turn._generate

    @functools.wraps(plain)
    def generate(base_url: str, input_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        return plain(base_url, [folded(ids) for ids in input_ids], *args, **kwargs)

    for module in (kits.single_turn, kits.multiturn):
        monkeypatch.setattr(module, "_generate", generate)


def run_kit(mixin: type, name: str, **attributes: Any) -> None:
    """One test of a kit, as its own framework would run it."""
    case = type("Kit", (mixin, unittest.TestCase), attributes)
    result = unittest.TestResult()
    case(name).run(result)
    assert result.testsRun == 1
    assert not result.failures + result.errors, (result.failures + result.errors)[0][1]


def test_multiturn_conversations_hit_what_the_kit_expects(
    cluster: Cluster, farm: Farm, kits: types.SimpleNamespace, tmp_path: Path
) -> None:
    dataset = tmp_path / "conversations.json"
    words = [f"word{number} and another {number * 7919 % 1000}, " for number in range(200)]
    turns = [{"value": "".join(random.Random(i).sample(words, 60))} for i in range(64)]
    dataset.write_text(json.dumps([{"conversations": [turn, turn]} for turn in turns]))

    metrics = kits.cache_hit.run_multiturn_cache_hit_test(
        cluster.servers["A"].url, str(farm.model), dataset_path=str(dataset), output_length=16
    )
    assert metrics["overall"]["total_cached_tokens"] > 0


def test_a_tree_of_shared_prefixes_is_served(
    cluster: Cluster, kits: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    grow = kits.radix.gen_radix_tree

    def smaller() -> list[dict[str, Any]]:
        nodes = grow(num_nodes=60, chunk_len=64)
        return [{**node, "input_ids": folded(node["input_ids"])} for node in nodes]

    monkeypatch.setattr(kits.radix, "gen_radix_tree", smaller)
    for name in ("A", "B"):
        kits.radix.run_radix_attention_test(cluster.servers[name].url)


@pytest.mark.usefixtures("small_vocabulary")
def test_a_flushed_prefix_comes_back_from_storage(
    cluster: Cluster, farm: Farm, kits: types.SimpleNamespace
) -> None:
    run_kit(
        kits.unified.AccuracyTwoPassMixin,
        "test_l3_prefetch_full_prefix_hit_after_flush",
        base_url=cluster.servers["A"].url,
        model=str(farm.model),
        l3_prefetch_page_size=farm.page_size,
    )


@pytest.mark.usefixtures("small_vocabulary")
@pytest.mark.parametrize(
    "name",
    [
        "test_multiturn_logprobs_match",
        "test_multiturn_prefill_cache_hit_branching",
        "test_multiturn_decode_cache_hit_branching",
    ],
)
def test_logprobs_with_cache_hits_match_a_replay(
    cluster: Cluster, farm: Farm, kits: types.SimpleNamespace, dice: random.Random, name: str
) -> None:
    run_kit(
        kits.unified.UnifiedRadixTreeTestMixin,
        name,
        base_url=cluster.servers["A"].url,
        model=str(farm.model),
        input_ids=[[dice.randint(3, 1000) for _ in range(512)] for _ in range(4)],
        max_new_tokens=16,
        num_groups=2,
        branches_per_group=2,
    )


def test_abort_all_ends_every_request(cluster: Cluster, kits: types.SimpleNamespace) -> None:
    server = cluster.servers["A"]

    class Process:
        poll = staticmethod(lambda: None if server.is_running else 1)

    run_kit(
        kits.abort.AbortAllMixin,
        "test_abort_all",
        base_url=server.url,
        process=Process,
        abort_all_num_requests=16,
        abort_all_max_new_tokens=8000,
    )
