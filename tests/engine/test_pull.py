"""Disaggregation over NIXL's pull connector: TP1 -> TP1 and TP2 -> TP1, against one colocated engine."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import uuid
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from hexgen2.deploy import guard
from tests.deploy.builders import cluster, group, plan
from tests.engine.fleet import Fleet, answers_agree, completion, running, token_ids
from tests.waiting import HUNG_S, until

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]

LAYERS = 8
BLOCK = 32
BLOCK_BYTES = BLOCK * LAYERS * 2 * 4 * 32 * 4  # layers x (K, V) x KV heads x head size x float32


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fleet]:
    devices = cluster(("a", "cpu-1c", 1), ("b", "cpu-1c", 2), ("c", "cpu-1c", 1), ("d", "cpu-1c", 1))
    groups = [
        group("p0", "prefill", (["a/0"], LAYERS), share=0.5),
        group("p1", "prefill", (["b/0", "b/1"], LAYERS), share=0.25),
        group("d0", "decode", (["c/0"], LAYERS), share=0.75),
        group("c0", "colocated", (["d/0"], LAYERS), share=0.25),
    ]
    routes = [("p0", "d0", 0.5), ("p1", "d0", 0.25)]
    run_dir = tmp_path_factory.mktemp("pull")
    async with running(plan(devices, groups, *routes, model="tiny-llama"), run_dir) as fleet:
        yield fleet


@pytest.mark.parametrize("prefill", ["p0", "p1"])
async def test_greedy_tokens_equal_a_colocated_engines(fleet: Fleet, prefill: str) -> None:
    await answers_agree(fleet, prefill, "d0", "c0")


async def test_the_cache_that_moves_is_the_prompts(fleet: Fleet) -> None:
    before = await fleet.metric("d0", "vllm:nixl_bytes_transferred_sum")
    body = completion("A prompt that no other test sends, so that no block of it is cached. " * 3)
    answer = await fleet.two_legs("p0", "d0", body)
    blocks = -(-answer["usage"]["prompt_tokens"] // BLOCK)
    assert blocks >= 2
    assert await fleet.metric("d0", "vllm:nixl_bytes_transferred_sum") - before == blocks * BLOCK_BYTES


async def test_many_at_once_through_both_prefill_engines(fleet: Fleet) -> None:
    bodies = [completion(f"Number {n} of many requests. " * (1 + n % 5), tokens=8) for n in range(12)]
    split = await asyncio.gather(*(fleet.two_legs(f"p{n % 2}", "d0", body) for n, body in enumerate(bodies)))
    whole = await asyncio.gather(*(fleet.direct("c0", body) for body in bodies))
    assert [token_ids(answer) for answer in split] == [token_ids(answer) for answer in whole]


async def test_chat_with_streaming(fleet: Fleet) -> None:
    path = "/v1/chat/completions"
    body = {
        "model": "tiny-llama",
        "messages": [{"role": "user", "content": "Tell me a story."}],
        "max_tokens": 12,
        "temperature": 0,
    }
    request_id = uuid.uuid4().hex
    first = await fleet.leg_one("p0", body, request_id, path)
    second = {**body, "stream": True, "kv_transfer_params": first["kv_transfer_params"]}
    text = ""
    async with fleet.http.post(
        fleet.url("d0", path), json=second, headers={"X-Request-Id": request_id}
    ) as response:
        assert response.status == 200
        async for line in response.content:
            if line.startswith(b"data: {"):
                event = json.loads(line.removeprefix(b"data: "))
                text += event["choices"][0]["delta"].get("content") or ""
    whole = await fleet.direct("c0", body, path)
    assert text
    assert text == whole["choices"][0]["message"]["content"]


async def test_a_cache_that_cannot_be_fetched_fails_the_request(fleet: Fleet) -> None:
    """Policy `fail`: the coordinator hears of it and can try another route; nothing hangs."""
    request_id = uuid.uuid4().hex
    body = completion("The engine that holds this cache has gone.")
    first = await fleet.leg_one("p0", body, request_id)
    gone = {**first["kv_transfer_params"], "remote_engine_id": "gone", "remote_port": 1}
    answer = await asyncio.wait_for(
        fleet.post("d0", "/v1/completions", {**body, "kv_transfer_params": gone}, request_id), 2 * HUNG_S
    )
    assert answer["status"] == 500 or answer["choices"][0]["finish_reason"] == "error", answer
    # And the engine lives on.
    await answers_agree(fleet, "p0", "d0", "c0")


async def test_an_engine_that_dies_is_reported(fleet: Fleet) -> None:
    """Near the end of this file: the decode engine's core is killed."""
    watch = asyncio.create_task(fleet.launcher.watch())
    await asyncio.sleep(0)
    core = [pid for pid in guard.descendants(fleet.launcher.pids()["d0"]) if "EngineCore" in _name(pid)]
    assert len(core) == 1
    os.kill(core[0], signal.SIGKILL)
    gone = await asyncio.wait_for(watch, 2 * HUNG_S)
    # Not the exit code: vLLM leaves with 0 when its engine core dies.
    assert gone.process == "d0"
    assert any("EngineDeadError" in line for line in gone.cause), gone.cause


async def test_nothing_is_left_even_if_a_guard_is_killed(fleet: Fleet) -> None:
    """Last in this file. The engine has four processes: API server, engine core, and a worker per TP rank."""
    pid = fleet.launcher.pids()["p1"]
    engine = guard.descendants(pid)
    assert sum("VLLM::" in _name(member) for member in engine) == 3
    os.kill(pid, signal.SIGKILL)
    await until(lambda: not any(_runs(member) for member in engine), every_s=0.1)


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _name(pid: int) -> str:
    with open(f"/proc/{pid}/cmdline", encoding="utf-8") as file:
        return file.read()
