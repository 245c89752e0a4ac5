"""Real vLLM engines on CPU for the tests, from a plan, and the two legs as a coordinator would send them."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from hexgen2.deploy import Deployment, EngineOptions, LocalLauncher, compile_plan, free_ports
from hexgen2.specs import Plan
from hexgen2.specs.catalog import load_model

START_S = 400.0
PROMPTS = (
    "Once upon a time",
    "The capital",
    "a",
    "The little fox ran through the wood and the river, and then it came to a house. " * 4,
    "Why does the moon shine?\nBecause",
)
NO_REMOTE = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


@dataclass
class Fleet:
    """Running engines, and a client of them."""

    deployment: Deployment
    launcher: LocalLauncher
    http: aiohttp.ClientSession
    ready_s: float

    def url(self, group_id: str, path: str) -> str:
        return self.deployment.coordinator.engine(group_id).url + path

    async def post(self, group_id: str, path: str, body: dict[str, Any], request_id: str) -> dict[str, Any]:
        """The answer, with the HTTP status under `status`."""
        headers = {"X-Request-Id": request_id}
        async with self.http.post(self.url(group_id, path), json=body, headers=headers) as response:
            answer: dict[str, Any] = await response.json()
            return {"status": response.status, **answer}

    async def direct(
        self, group_id: str, body: dict[str, Any], path: str = "/v1/completions"
    ) -> dict[str, Any]:
        """The answer of one engine alone."""
        return await self.post(group_id, path, body, uuid.uuid4().hex)

    async def two_legs(
        self, prefill: str, decode: str, body: dict[str, Any], path: str = "/v1/completions"
    ) -> dict[str, Any]:
        """The answer of a decode engine that got the prompt's KV cache from a prefill engine."""
        request_id = uuid.uuid4().hex
        first = await self.leg_one(prefill, body, request_id, path)
        return await self.post(
            decode, path, {**body, "kv_transfer_params": first["kv_transfer_params"]}, request_id
        )

    async def leg_one(
        self, prefill: str, body: dict[str, Any], request_id: str, path: str = "/v1/completions"
    ) -> dict[str, Any]:
        one_token = {**body, "max_tokens": 1, "stream": False, "kv_transfer_params": NO_REMOTE}
        answer = await self.post(prefill, path, one_token, request_id)
        assert answer["status"] == 200, answer
        assert answer["kv_transfer_params"]["do_remote_prefill"] is True
        return answer

    async def metric(self, group_id: str, name: str) -> float:
        """The sum over labels of one of an engine's Prometheus counters."""
        async with self.http.get(self.url(group_id, "/metrics")) as response:
            lines = (await response.text()).splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + "{"))


@asynccontextmanager
async def running(plan: Plan, run_dir: Path, options: EngineOptions | None = None) -> AsyncIterator[Fleet]:
    """Compile and start a plan for the shipped model; everything is stopped at the end."""
    deployment = compile_plan(plan, load_model("tiny-llama"), free_ports(), options)
    async with LocalLauncher(run_dir) as launcher, aiohttp.ClientSession() as http:
        begun = time.monotonic()
        await launcher.start(deployment)
        await launcher.wait_ready(START_S)
        yield Fleet(deployment, launcher, http, time.monotonic() - begun)


def completion(prompt: str, tokens: int = 16, **more: Any) -> dict[str, Any]:
    """A greedy request whose answer carries token ids."""
    return {
        "model": "tiny-llama",
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        **more,
    }


def token_ids(answer: dict[str, Any]) -> list[int]:
    assert answer["status"] == 200, answer
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "length", answer
    ids: list[int] = choice["token_ids"]
    return ids


async def answers_agree(fleet: Fleet, prefill: str, decode: str, alone: str) -> None:
    """Every prompt's greedy tokens are the same over two legs and from one colocated engine."""
    for prompt in PROMPTS:
        body = completion(prompt)
        split, whole = await asyncio.gather(fleet.two_legs(prefill, decode, body), fleet.direct(alone, body))
        assert token_ids(split) == token_ids(whole), prompt
