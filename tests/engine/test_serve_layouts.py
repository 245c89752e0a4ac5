"""A plan that vLLM alone cannot run, on real engines: our layouts and our connector behind the coordinator."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from hexgen2.coordinator import Coordinator, KvTotals, kv_transfer_totals, legs
from hexgen2.specs.catalog import load_model
from tests.deploy.builders import cluster, group, plan
from tests.engine.fleet import PROMPTS, Fleet, completion, running

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fleet]:
    """Prefill: TP 2 for 5 layers on one node, TP 1 for 3 on another. Decode: two stages of TP 1. And one plain
    engine to compare with."""
    devices = cluster(("a", "cpu-1c", 2), ("b", "cpu-1c", 1), ("c", "cpu-1c", 2), ("d", "cpu-1c", 1))
    groups = [
        group("p0", "prefill", (["a/0", "a/1"], 5), (["b/0"], 3), share=1.0),
        group("d0", "decode", (["c/0"], 2), (["c/1"], 6), share=1.0),
        group("c0", "colocated", (["d/0"], 8), share=0.0),
    ]
    made = plan(devices, groups, ("p0", "d0", 1.0), model="tiny-llama", engine="vllm-asymmetric")
    async with running(made, tmp_path_factory.mktemp("layouts")) as fleet:
        yield fleet


@pytest.mark.parametrize("overlap", [False, True])
async def test_lopsided_groups_answer_as_one_engine_does(
    fleet: Fleet, overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model("tiny-llama")
    programs = {process.name: process.argv[2] for process in fleet.deployment.processes}
    assert programs["p0.0"] == programs["p0.1"] == "hexgen2.vllm_plugin.asymmetric.server"
    tokens = overlapped = 0
    make_body = legs.overlapped_body

    def counted(*arguments: Any) -> legs.Body:
        nonlocal overlapped
        overlapped += 1
        return make_body(*arguments)

    monkeypatch.setattr(legs, "overlapped_body", counted)
    config = fleet.deployment.coordinator.model_copy(update={"overlap_kv": overlap})
    async with Coordinator(config).running() as door:
        url = door.fleet.engines["d0"].endpoint.url
        before = (await kv_transfer_totals({"d0": url}, fleet.http)).get("d0", KvTotals())
        for prompt in PROMPTS:
            body = {**completion(prompt), "cache_salt": f"overlap {overlap}"}
            alone = await fleet.direct("c0", body)
            async with fleet.http.post(door.url + "/v1/completions", json=body) as response:
                assert response.status == 200, await response.text()
                both = await response.json()
            assert both["choices"][0]["token_ids"] == alone["choices"][0]["token_ids"], prompt
            tokens += both["usage"]["prompt_tokens"] - 1  # the last one is computed where the answer is made
        await fleet.direct("d0", completion("a", 2))  # the counters follow with the engine's next steps
        moved = (await kv_transfer_totals({"d0": url}, fleet.http)).get("d0", KvTotals())
    assert overlapped == (len(PROMPTS) - 1 if overlap else 0)  # the first one teaches where to read
    assert moved.failed == moved.expired == 0
    assert (
        moved.bytes - before.bytes >= tokens * model.kv_bytes_per_token * 4 / model.kv_bytes
    )  # float32 on CPU
