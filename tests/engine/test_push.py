"""Disaggregation over NIXL's push connector, from pipelined prefill engines to a plain decode engine.

One prefill group holds its two stages (3 + 5 layers) on one node, one has them (5 + 3) on two nodes and so
consists of two processes; a third is not pipelined. One decode group serves them all.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.deploy.builders import cluster, group, plan
from tests.engine.fleet import Fleet, answers_agree, running

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fleet]:
    devices = cluster(("a", "cpu-1c", 2), ("b", "cpu-1c", 1), ("c", "cpu-1c", 4))
    groups = [
        group("p0", "prefill", (["a/0"], 3), (["a/1"], 5), share=0.5),
        group("p1", "prefill", (["b/0"], 5), (["c/0"], 3), share=0.2),
        group("p2", "prefill", (["c/1"], 8), share=0.1),
        group("d0", "decode", (["c/2"], 8), share=0.8),
        group("c0", "colocated", (["c/3"], 8), share=0.2),
    ]
    routes = [("p0", "d0", 0.5), ("p1", "d0", 0.2), ("p2", "d0", 0.1)]
    run_dir = tmp_path_factory.mktemp("push")
    async with running(plan(devices, groups, *routes, model="tiny-llama"), run_dir) as fleet:
        yield fleet


@pytest.mark.parametrize("prefill", ["p0", "p1", "p2"])
async def test_greedy_tokens_equal_a_colocated_engines(fleet: Fleet, prefill: str) -> None:
    assert len(fleet.deployment.group(prefill)) == (2 if prefill == "p1" else 1)
    await answers_agree(fleet, prefill, "d0", "c0")
    assert await fleet.metric(prefill, "vllm:nixl_bytes_transferred_sum") > 0
