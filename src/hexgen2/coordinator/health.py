"""The watch over the engines: /health polls bring them in and take them out."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import re

import aiohttp

from hexgen2.coordinator.client import EngineClient
from hexgen2.coordinator.config import CoordinatorConfig
from hexgen2.coordinator.engine import Engine
from hexgen2.coordinator.fleet import Fleet
from hexgen2.coordinator.upstream import lacks_means
from hexgen2.coordinator.watches import going_on

log = logging.getLogger(__name__)

# Answers to /metrics are large and matter less than the next /health poll.
_METRICS_S = 1.0
_KV_USED = re.compile(rb"^vllm:kv_cache_usage_perc(?:\{[^}]*\})? (\S+)$", re.MULTILINE)


def parse_kv_used(exposition: bytes) -> float:
    """The part of an engine's KV blocks in use, 0 to 1, from its /metrics; 0 where it does not say.

    >>> parse_kv_used(b'vllm:kv_cache_usage_perc{engine="0"} 0.25')
    0.25
    """
    return max((float(value) for value in _KV_USED.findall(exposition)), default=0.0)


class HealthWatch:
    """One task per engine. An engine is up with one good poll; it is down

    - at once when it refuses the connection or answers 5xx (vLLM's core has died), and
    - after `unhealthy_after` polls in a row that got no answer: a busy machine answers late now and then.
    """

    def __init__(self, config: CoordinatorConfig, client: EngineClient, fleet: Fleet) -> None:
        self._timeouts = config.timeouts
        self._unhealthy_after = config.limits.unhealthy_after
        self._client = client
        self._fleet = fleet
        self._tasks: dict[Engine, asyncio.Task[None]] = {}

    async def start(self) -> None:
        """Poll every engine once, then go on in the background."""
        await asyncio.gather(*map(self.poll, self._fleet.engines.values()))
        self.follow()

    def follow(self) -> None:
        """Watch the engines that the fleet has now, and no others."""
        known = set(self._fleet.engines.values())
        for engine in known.difference(self._tasks):
            self._tasks[engine] = asyncio.create_task(self._watch(engine), name=f"health-{engine.id}")
        for engine in set(self._tasks).difference(known):
            self._tasks.pop(engine).cancel()

    async def stop(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        for task in self._tasks.values():
            with contextlib.suppress(asyncio.CancelledError):
                await task
        self._tasks = {}

    async def _watch(self, engine: Engine) -> None:
        if not engine.up:
            await self.poll(engine)
        while True:
            await asyncio.sleep(self._timeouts.health_interval_s)
            with going_on("health watch"):
                await self.poll(engine)

    async def poll(self, engine: Engine) -> None:
        """Ask one engine how it is and note the answer."""
        fleet, began, downs = self._fleet, asyncio.get_running_loop().time(), engine.downs
        try:
            status = (await self._get(engine, "/health"))[0]
        except (aiohttp.ClientError, ConnectionError, TimeoutError) as error:
            self._unanswered(engine, error, began)
        else:
            if status == 200 and engine.downs != downs:
                return  # it has ended since: this is its predecessor's answer
            if status == 200:
                fleet.mark_up(engine)
                if engine.max_model_len is None:
                    await self._ask_length(engine)
                await self._ask_kv(engine)
            else:
                fleet.mark_down(engine, f"/health answered {status}")

    def _unanswered(self, engine: Engine, error: Exception, began: float) -> None:
        """A poll from `began` on (event-loop time) came to nothing."""
        gone = (aiohttp.ClientConnectorError, aiohttp.ServerDisconnectedError, ConnectionError)
        if isinstance(error, OSError) and lacks_means(error):
            log.warning("engine %s cannot be asked for its health: %s", engine.id, error.strerror)
        elif isinstance(error, gone):
            self._fleet.mark_down(engine, f"no connection ({type(error).__name__})")
        elif engine.heard_at <= began:  # else it is busy answering requests, or this process was late itself
            engine.missed_polls += 1
            if engine.missed_polls >= self._unhealthy_after or not engine.up:
                reason = f"no answer from /health, {engine.missed_polls} times in a row"
                self._fleet.mark_down(engine, reason, silent=True)

    async def _ask_length(self, engine: Engine) -> None:
        """The longest context, shown by /v1/models; an engine that does not say leaves it open."""
        with contextlib.suppress(aiohttp.ClientError, TimeoutError, ValueError, LookupError, TypeError):
            status, body = await self._get(engine, "/v1/models")
            if status == 200:
                length = json.loads(body)["data"][0]["max_model_len"]
                engine.max_model_len = int(length) if length is not None else None

    async def _ask_kv(self, engine: Engine) -> None:
        """How much of its KV cache is in use; unknown counts as none."""
        used = 0.0
        with contextlib.suppress(aiohttp.ClientError, TimeoutError, ValueError):
            status, body = await self._get(engine, "/metrics", _METRICS_S)
            if status == 200:
                used = parse_kv_used(body)
        if engine.up:
            self._fleet.note_kv(engine, used)

    async def _get(self, engine: Engine, path: str, at_most_s: float = math.inf) -> tuple[int, bytes]:
        timeout = aiohttp.ClientTimeout(total=min(self._timeouts.health_timeout_s, at_most_s))
        async with self._client.probes.get(engine.endpoint.url + path, timeout=timeout) as response:
            return response.status, await response.read()
