"""Leg 1 of a disaggregated request, and what leg 2 gets of it."""

from __future__ import annotations

import asyncio
import json
import time

from aiohttp import web

from hexgen2.coordinator import legs
from hexgen2.coordinator.calls import EngineCall
from hexgen2.coordinator.client import EngineClient
from hexgen2.coordinator.config import CoordinatorConfig
from hexgen2.coordinator.desk import Meter
from hexgen2.coordinator.engine import Engine
from hexgen2.coordinator.errors import EngineFailure
from hexgen2.coordinator.request import REQUEST_ID, ClientRequest, encode
from hexgen2.coordinator.stream import finished_with_error
from hexgen2.coordinator.tracing import Part

# Prompts at a prefill engine from which the next one is not likely to begin at once.
_AHEAD = 4


class FirstLeg:
    """Has prompts computed by prefill engines."""

    def __init__(self, config: CoordinatorConfig, client: EngineClient, meter: Meter) -> None:
        self._timeouts = config.timeouts
        self._client = client
        self._meter = meter
        self._overlap = config.overlap_kv
        self._streams: dict[str, tuple[int, legs.Body]] = {}
        """By engine, in which life: what leg 2 needs to read its caches while they are computed."""

    def stream(self, group: str, decode: Engine) -> legs.Body | None:
        """What leg 2 needs to be sent along with leg 1; None where it should wait for leg 1's end: the engine
        has not said it yet in this life, or its prompts queue, or the decode engine has no place free. Waiting
        there for a prefill that waits itself would keep others out."""
        engine = self._client.engine(group)
        life, stream = self._streams.get(group, (-1, None))
        if not self._overlap or life != engine.lives or engine.in_flight >= _AHEAD or not decode.gate.is_free:
            return None
        return stream

    async def run(
        self, request: ClientRequest, group: str, part: Part, key: str | None = None
    ) -> legs.Handoff | web.Response:
        """What it leaves for leg 2, or the engine's refusal. With a `key` the cache can be read by that name
        meanwhile."""
        began, sent_at = time.perf_counter(), asyncio.get_running_loop().time()
        life, within = self._client.engine(group).lives, self._timeouts.prefill_s
        async with self._client.call(group) as call:
            body, headers = encode(legs.prefill_body(request.body, key)), part.headers(request.headers)
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
        if self._overlap and (stream := legs.stream_of(kv)) is not None:
            self._streams[group] = (life, stream)
        self._meter.time("leg_seconds", time.perf_counter() - began, group, "prefill")
        since = self._client.surely_at(sent_at, asyncio.get_running_loop().time())
        return legs.Handoff(kv if isinstance(kv, dict) else None, group, life, since)

    def second_body(self, request: ClientRequest, handoff: legs.Handoff) -> bytes:
        """Leg 2's body, with the KV cache as long as that can be trusted; EngineFailure where it is lost."""
        engine = self._client.desk.engines.get(handoff.prefill)
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
