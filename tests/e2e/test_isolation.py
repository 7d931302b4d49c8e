# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Requests that must not see each other's cache, through the HTTP API of two servers."""

from __future__ import annotations

import random

import pytest
from sglang_cpu.client import Generation, SGLangClient
from two_instances.cluster import Cluster

from .farm import Farm

PROMPT_TOKENS = 800


def ask_in(server: SGLangClient, prompt: list[int], field: str, name: str | None) -> Generation:
    """One request in the namespace `name`; None: outside any."""
    fields = {} if name is None else {field: name}
    return server.generate(prompt, 4, return_cached_tokens_details=True, **fields)


@pytest.mark.parametrize("cluster", ["page64"], indirect=True)
@pytest.mark.parametrize("field", ["cache_salt", "extra_key"])
def test_a_namespace_loads_its_own_pages_and_nobody_elses(
    cluster: Cluster, farm: Farm, dice: random.Random, field: str
) -> None:
    a, b = cluster.servers["A"], cluster.servers["B"]
    prompt = [dice.randint(3, 1000) for _ in range(PROMPT_TOKENS)]
    truth = farm.reference.generate(prompt, 4).output_ids
    pages = PROMPT_TOKENS // farm.page_size
    names = ("tenant-1", "tenant-2", None)

    for number, name in enumerate(names, start=1):
        before = cluster.pool.stored_pages()
        for server in (b, a):  # B first: it must find nothing of the namespaces before
            got = ask_in(server, prompt, field, name)
            assert got.output_ids == truth
            if server is b:
                assert got.cached_tokens == 0, f"{name}, number {number}, saw another's pages"
                assert cluster.pool.wait_stored(before + pages) == before + pages
            else:
                assert got.cached_tokens_details["storage"] == pages * farm.page_size
