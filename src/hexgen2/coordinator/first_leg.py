"""Leg 1 of a disaggregated request, and what leg 2 gets of it."""

from __future__ import annotations

import asyncio
import json
import time

from aiohttp import web

from hexgen2.coordinator import legs
from hexgen2.coordinator.calls import EngineCall, EngineClient
from hexgen2.coordinator.config import CoordinatorConfig
from hexgen2.coordinator.desk import Meter
from hexgen2.coordinator.errors import EngineFailure
from hexgen2.coordinator.request import REQUEST_ID, ClientRequest, encode
from hexgen2.coordinator.stream import finished_with_error
from hexgen2.coordinator.tracing import Part


class FirstLeg:
    """Has prompts computed by prefill engines."""

    def __init__(self, config: CoordinatorConfig, client: EngineClient, meter: Meter) -> None:
        self._timeouts = config.timeouts
        self._client = client
        self._engines = client.desk.engines
        self._meter = meter

    async def run(self, request: ClientRequest, group: str, part: Part) -> legs.Handoff | web.Response:
        """What it leaves for leg 2, or the engine's refusal."""
        began, sent_at = time.perf_counter(), asyncio.get_running_loop().time()
        life, within = self._engines[group].lives, self._timeouts.prefill_s
        async with self._client.call(group) as call:
            body, headers = encode(legs.prefill_body(request.body)), part.headers(request.headers)
            await call.open(request.endpoint, body, headers, within)
            content = await call.read(within)
            if call.status != 200:
                return refusal(call, content, request)
            if finished_with_error(content):
                raise EngineFailure("finish_error", group, "its prefill ended with an error")
            try:
                kv = json.loads(content)["kv_transfer_params"]
            except (ValueError, LookupError, TypeError):
                raise EngineFailure("bad_answer", group, "its answer carries no kv_transfer_params") from None
        self._meter.time("leg_seconds", time.perf_counter() - began, group, "prefill")
        since = self._client.surely_at(sent_at, asyncio.get_running_loop().time())
        return legs.Handoff(kv if isinstance(kv, dict) else None, group, life, since)

    def second_body(self, request: ClientRequest, handoff: legs.Handoff) -> bytes:
        """Leg 2's body, with the KV cache as long as that can be trusted; EngineFailure where it is lost."""
        engine = self._engines.get(handoff.prefill)
        if engine is None or engine.lives != handoff.life or not engine.up:
            raise EngineFailure("down", handoff.prefill, "it went down before its KV cache was fetched")
        reason = None
        if handoff.kv is None:
            reason = "none_offered"
        elif handoff.expired(asyncio.get_running_loop().time(), self._timeouts.kv_lease_s):
            reason = "lease_expired"
        if reason is None:
            return encode(legs.decode_body(request.body, handoff.kv))
        self._meter.count("without_kv", reason)
        return request.raw


def refusal(call: EngineCall, content: bytes, request: ClientRequest) -> web.Response:
    """An engine's 4xx is the client's to see, as it is."""
    headers = {"Content-Type": call.content_type, REQUEST_ID: request.id}
    return web.Response(status=call.status, body=content, headers=headers)
