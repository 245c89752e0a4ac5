"""A fleet of emulated engines on real sockets with a coordinator before them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest

from hexgen2.coordinator import (
    ApiKeys,
    Coordinator,
    CoordinatorConfig,
    EngineEndpoint,
    Limits,
    RouteShare,
    Timeouts,
)
from hexgen2.emulator import EmulatedEngine, EmulatorConfig, tokens
from hexgen2.specs.plan import Role
from tests.waiting import HUNG_S, until_answered

MODEL = "tiny"
ROLES: dict[str, Role] = {"p": "prefill", "d": "decode", "c": "colocated"}
"""By the first letter of a group's name."""
# Where a test is about one of these limits it sets that one; the others must not run out on a machine that is
# held up for some seconds.
QUICK = Timeouts(
    connect_s=HUNG_S,
    prefill_s=HUNG_S,
    first_byte_s=HUNG_S,
    idle_s=HUNG_S,
    request_s=2 * HUNG_S,
    health_interval_s=0.05,
    health_timeout_s=HUNG_S,
    drain_s=HUNG_S,
)

PATIENT = Limits(unhealthy_after=2, engine_wait_s=HUNG_S)

# For tests in which an engine falls silent: they must not wait long to notice. Engines that are well may be
# taken for silent too, where the machine is held up for longer than this.
ALERT = QUICK.model_copy(update={"health_timeout_s": 0.3})


@dataclass
class Stand:
    """What a test drives: the coordinator, its engines by group, and an HTTP session."""

    coordinator: Coordinator
    engines: dict[str, EmulatedEngine]
    http: aiohttp.ClientSession
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return self.coordinator.url

    async def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any, Mapping[str, str]]:
        """Status, JSON (or raw text) and headers of an answer. Keyword `a_b` is header `A-B`."""
        sent = self.headers | {name.replace("_", "-"): value for name, value in headers.items()}
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with self.http.post(self.url + path, data=data, headers=sent) as response:
            text = await response.text()
            shown = json.loads(text) if "json" in response.headers["Content-Type"] else text
            return response.status, shown, response.headers

    async def complete(self, prompt: Any = "a b c", **body: Any) -> dict[str, Any]:
        status, answer, _ = await self.post("/v1/completions", {"model": MODEL, "prompt": prompt, **body})
        assert status == 200, answer
        assert isinstance(answer, dict)
        return answer

    async def stream(self, prompt: Any = "a b c", path: str = "/v1/completions", **body: Any) -> list[Any]:
        """Every event of a streamed completion (JSON, or "[DONE]")."""
        base: dict[str, Any] = {"model": MODEL, "stream": True}
        if path == "/v1/completions":
            base["prompt"] = prompt
        status, text, _ = await self.post(path, base | body)
        assert status == 200, text
        return parse_events(text)

    def received(self, group: str) -> list[dict[str, Any]]:
        return [request.body for request in self.engines[group].received]

    async def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples with these labels, as /metrics shows it."""
        async with self.http.get(self.url + "/metrics") as response:
            lines = (await response.text()).splitlines()
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        found = [
            float(line.rsplit(" ", 1)[1])
            for line in lines
            if line.startswith((name + "{", name + " ")) and all(label in line for label in wanted)
        ]
        assert found or not labels, f"no {name} with {labels}"
        return sum(found)

    async def counted(self, value: float, name: str, **labels: str) -> None:
        """Wait until a metric has this value: what became of a request may be noted after its last byte."""

        async def has_it() -> bool:
            try:
                return await self.metric(name, **labels) == value
            except AssertionError:  # nothing with these labels yet
                return False

        await until_answered(has_it)


def parse_events(text: str) -> list[Any]:
    found = [part.removeprefix("data: ") for part in text.split("\n\n") if part]
    return [part if part == "[DONE]" else json.loads(part) for part in found]


def text_of(events: Sequence[Any]) -> str:
    """The text of a stream's chunks."""
    choices = [event["choices"][0] for event in events if event != "[DONE]" and event.get("choices")]
    return "".join(choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices)


def expected(prompt: str, count: int) -> str:
    """What a healthy engine answers."""
    return tokens.decode(tokens.generate(tokens.encode(prompt), count))


def endpoints(
    engines: dict[str, EmulatedEngine], shares: dict[str, float], batch: int
) -> tuple[EngineEndpoint, ...]:
    return tuple(
        EngineEndpoint(
            group_id=group, role=ROLES[group[0]], url=engine.url, share=shares[group], max_batch=batch
        )
        for group, engine in engines.items()
    )


@contextlib.asynccontextmanager
async def running(
    routes: dict[str, float],
    *,
    emulator: EmulatorConfig | None = None,
    timeouts: Timeouts = QUICK,
    limits: Limits | None = None,
    keys: ApiKeys | None = None,
    batch: int = 64,
    workers: int = 1,
) -> AsyncIterator[Stand]:
    """`routes` maps "p0>d0" (two legs) or "c0" (one engine) to shares; engines are made from the names."""
    shares: dict[str, float] = {}
    for name, share in routes.items():
        for group in name.split(">"):
            shares[group] = min(1.0, shares.get(group, 0.0) + share)
    base = emulator or EmulatorConfig()
    config = EmulatorConfig(**{**base.__dict__, "model_names": (MODEL,)})
    async with contextlib.AsyncExitStack() as stack:
        engines = {g: await stack.enter_async_context(EmulatedEngine(config).running()) for g in shares}
        pairs = [(name.split(">"), share) for name, share in routes.items() if ">" in name]
        coordinator_config = CoordinatorConfig(
            served_model_names=(MODEL, "alias"),
            engines=endpoints(engines, shares, batch),
            routes=tuple(RouteShare(prefill=p, decode=d, share=share) for (p, d), share in pairs),
            timeouts=timeouts,
            limits=limits or PATIENT,
        )
        door = Coordinator(coordinator_config, keys, workers=workers)
        coordinator = await stack.enter_async_context(door.running())
        http = await stack.enter_async_context(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)))
        yield Stand(coordinator, engines, http)


@pytest.fixture
async def pair() -> AsyncIterator[Stand]:
    """One prefill and one decode engine."""
    async with running({"p0>d0": 1.0}) as stand:
        yield stand
