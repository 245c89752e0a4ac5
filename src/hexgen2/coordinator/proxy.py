"""A request's way through the fleet: choose a path, run its legs, try another path where that fails."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from hexgen2.coordinator import legs
from hexgen2.coordinator.calls import EngineCall, EngineClient
from hexgen2.coordinator.config import CoordinatorConfig
from hexgen2.coordinator.errors import EngineFailure, no_path
from hexgen2.coordinator.metrics import Metrics
from hexgen2.coordinator.request import REQUEST_ID, ClientRequest, encode
from hexgen2.coordinator.routing import Path
from hexgen2.coordinator.stream import completion_tokens, finished_with_error

log = logging.getLogger(__name__)

REPORT_HEADER = "X-Hexgen2-Report"


@dataclass(eq=False)
class Exchange:
    """One request while it is served: what the client has been sent, and what was tried."""

    http: web.Request
    request: ClientRequest
    failed_paths: list[Path] = field(default_factory=list)
    retries: int = 0
    response: web.StreamResponse | None = None
    first_token_at: float | None = None
    last_token_at: float | None = None
    events: int = 0


class Proxy:
    """Serves one request after another, each in its own task."""

    def __init__(self, config: CoordinatorConfig, client: EngineClient, metrics: Metrics) -> None:
        self._config = config
        self._client = client
        self._fleet = client.fleet
        self._metrics = metrics

    async def serve(self, http: web.Request, request: ClientRequest) -> web.StreamResponse:
        """Answer a request; ApiError where it cannot be and nothing has been sent yet."""
        if request.obstacle is not None:
            self._metrics.one_engine.labels(request.obstacle).inc()
        exchange = Exchange(http, request)
        while True:
            path = self._fleet.choose(request.obstacle is not None, exchange.failed_paths)
            if path is None:
                raise no_path()
            self._metrics.routed.labels(path.prefill or "", path.target).inc()
            try:
                return await self._attempt(exchange, path)
            except EngineFailure as failure:
                self._count(failure)
                if exchange.response is not None:
                    return await self._break_off(exchange, failure)
                exchange.failed_paths.append(path)
                if exchange.retries >= self._config.limits.max_retries:
                    raise failure.as_api_error() from failure
                exchange.retries += 1
                self._metrics.retries.inc()
                log.info("request %s: %s; trying another route", request.id, failure)

    def _count(self, failure: EngineFailure) -> None:
        role = self._fleet.engines[failure.group_id].endpoint.role
        self._metrics.failures.labels(failure.group_id, role, failure.kind).inc()

    async def _break_off(self, exchange: Exchange, failure: EngineFailure) -> web.StreamResponse:
        """End a stream that has begun with an error event: `[DONE]` would say that it is whole."""
        assert exchange.response is not None
        log.warning("request %s: stream broken off: %s", exchange.request.id, failure)
        await exchange.response.write(failure.as_api_error().event())
        await exchange.response.write_eof()
        return exchange.response

    async def _attempt(self, exchange: Exchange, path: Path) -> web.StreamResponse:
        request = exchange.request
        body = request.raw
        if path.prefill is not None:
            answer = await self._prefill(request, path.prefill)
            if isinstance(answer, web.Response):
                return answer
            body = encode(legs.decode_body(request.body, answer)) if answer is not None else request.raw
        return await self._generate(exchange, path, body)

    async def _prefill(self, request: ClientRequest, group: str) -> dict[str, Any] | web.Response | None:
        """Leg 1: the `kv_transfer_params` to hand on, None where there are none, or the engine's refusal."""
        began = time.perf_counter()
        within = self._config.timeouts.prefill_s
        async with self._client.call(group) as call:
            await call.open(request.endpoint, encode(legs.prefill_body(request.body)), request.headers, within)
            content = await call.read(within)
            if call.status != 200:
                return self._refusal(call, content, request)
            if finished_with_error(content):
                raise EngineFailure("finish_error", group, "its prefill ended with an error")
            try:
                kv = json.loads(content)["kv_transfer_params"]
            except (ValueError, LookupError, TypeError):
                raise EngineFailure("bad_answer", group, "its answer carries no kv_transfer_params") from None
        self._observe_leg(call, began)
        if kv is None:
            self._metrics.without_kv.inc()
        return kv if isinstance(kv, dict) else None

    async def _generate(self, exchange: Exchange, path: Path, body: bytes) -> web.StreamResponse:
        """Leg 2, or the only leg: the answer goes to the client."""
        request, timeouts = exchange.request, self._config.timeouts
        began = time.perf_counter()
        async with self._client.call(path.target) as call:
            await call.open(request.endpoint, body, request.headers, timeouts.first_byte_s)
            if call.status != 200 or not call.content_type.startswith("text/event-stream"):
                content = await call.read(timeouts.first_byte_s)
                if call.status != 200:
                    return self._refusal(call, content, request)
                if finished_with_error(content):
                    raise EngineFailure("finish_error", path.target, "the generation ended with an error")
                response: web.StreamResponse = self._answer(exchange, path, call, content)
            else:
                response = await self._relay(exchange, path, call)
        self._observe_leg(call, began)
        self._observe_request(exchange, path)
        return response

    def _refusal(self, call: EngineCall, content: bytes, request: ClientRequest) -> web.Response:
        """An engine's 4xx is the client's to see, as it is."""
        headers = {"Content-Type": call.content_type, REQUEST_ID: request.id}
        return web.Response(status=call.status, body=content, headers=headers)

    def _answer(self, exchange: Exchange, path: Path, call: EngineCall, content: bytes) -> web.Response:
        self._metrics.output_tokens.inc(completion_tokens(content) or 0)
        headers = {"Content-Type": call.content_type, **self._report(exchange, path)}
        return web.Response(status=200, body=content, headers=headers)

    async def _relay(self, exchange: Exchange, path: Path, call: EngineCall) -> web.StreamResponse:
        """Pass a stream on, block by block.

        The client's response starts with the first good block, not before: until then another engine can
        still take over unseen.
        """
        timeouts = self._config.timeouts
        within = timeouts.first_byte_s
        while (block := await call.next_block(within)) is not None:
            within = timeouts.idle_s
            exchange.last_token_at = time.perf_counter()
            exchange.events += block.count(b"\n\n")
            if exchange.response is None:
                exchange.first_token_at = exchange.last_token_at
                exchange.response = await self._start_stream(exchange, path, call)
            await exchange.response.write(block)
        assert exchange.response is not None, "a stream ends after its first block"
        await exchange.response.write_eof()
        return exchange.response

    async def _start_stream(self, exchange: Exchange, path: Path, call: EngineCall) -> web.StreamResponse:
        response = web.StreamResponse(
            headers={"Content-Type": call.content_type, **self._report(exchange, path)}
        )
        response.headers["Cache-Control"] = "no-cache"
        await response.prepare(exchange.http)
        return response

    def _report(self, exchange: Exchange, path: Path) -> dict[str, str]:
        headers = {REQUEST_ID: exchange.request.id}
        if exchange.http.headers.get(REPORT_HEADER):
            headers |= {"X-Hexgen2-Route": str(path), "X-Hexgen2-Retries": str(exchange.retries)}
        return headers

    def _observe_leg(self, call: EngineCall, began: float) -> None:
        labels = (call.engine.id, call.engine.endpoint.role)
        self._metrics.leg_seconds.labels(*labels).observe(time.perf_counter() - began)

    def _observe_request(self, exchange: Exchange, path: Path) -> None:
        labels = (path.target, self._fleet.engines[path.target].endpoint.role)
        arrived = exchange.request.arrived
        self._metrics.e2e.labels(*labels).observe(time.perf_counter() - arrived)
        first, last = exchange.first_token_at, exchange.last_token_at
        if first is None or last is None:
            return
        self._metrics.ttft.labels(*labels).observe(first - arrived)
        # Besides the tokens' events a stream has `[DONE]`, and in chat one that only names the role.
        generated = exchange.events - (2 if exchange.request.chat else 1)
        self._metrics.output_tokens.inc(max(0, generated))
        if generated > 1:
            self._metrics.tpot.labels(*labels).observe((last - first) / (generated - 1))
