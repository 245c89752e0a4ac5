"""A request's way through the fleet: choose a path, run its legs, try another path where that fails."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid

from aiohttp import web

from hexgen2.coordinator import legs, migration
from hexgen2.coordinator.calls import EngineCall
from hexgen2.coordinator.client import EngineClient
from hexgen2.coordinator.client_stream import ClientStream
from hexgen2.coordinator.config import CoordinatorConfig
from hexgen2.coordinator.continuation import closing
from hexgen2.coordinator.desk import Held, Meter
from hexgen2.coordinator.errors import ApiError, ClientGone, EngineFailure, internal, no_path, took_too_long
from hexgen2.coordinator.exchange import Exchange
from hexgen2.coordinator.first_leg import FirstLeg, refusal
from hexgen2.coordinator.fleet import Want
from hexgen2.coordinator.observer import Observer
from hexgen2.coordinator.prefixes import prefix_blocks
from hexgen2.coordinator.replay import Differs
from hexgen2.coordinator.request import REQUEST_ID, ClientRequest, encode
from hexgen2.coordinator.stream import completion_tokens, finished_with_error, prompt_tokens
from hexgen2.coordinator.tracing import Trace
from hexgen2.specs.classes import RequestSize
from hexgen2.specs.routing import Path

log = logging.getLogger(__name__)

_STEP_S = 1.0

REPORT_HEADER = "X-Hexgen2-Report"


class Proxy:
    """Serves one request after another, each in its own task."""

    def __init__(self, config: CoordinatorConfig, client: EngineClient, meter: Meter) -> None:
        self._config = config
        self._client = client
        self._desk = client.desk
        self._meter = meter
        self._first = FirstLeg(config, client, meter)
        self._observer = Observer(meter, client.desk)

    def want(self, request: ClientRequest) -> Want:
        """What a request asks of the fleet."""
        long_bytes = self._config.limits.long_prompt_bytes
        return Want(
            one_engine=request.obstacle is not None,
            size=self._size(request),
            prefix=prefix_blocks(request.body) if self._config.limits.affinity_slack else (),
            weight=max(1.0, len(request.raw) / long_bytes),
            priority=request.priority,
            long=len(request.raw) > long_bytes,
        )

    def _size(self, request: ClientRequest) -> RequestSize:
        # Without classes nobody asks how long a prompt is.
        return self._observer.sizes.size(request) if self._desk.by_class else RequestSize()

    async def serve(
        self, http: web.Request, request: ClientRequest, place: Held, trace: Trace
    ) -> web.StreamResponse:
        """Answer a request that has a place; ApiError where it cannot be and nothing has been sent yet."""
        if request.obstacle is not None:
            self._meter.count("one_engine", request.obstacle)
        limits = self._config.limits
        exchange = Exchange.begin(http, request, place, trace, limits.max_migrations > 0, limits.seed_streams)
        limit_s = self._config.timeouts.request_s
        try:
            async with asyncio.timeout(limit_s):
                return await self._serve(exchange)
        except TimeoutError:
            error = took_too_long(limit_s)
        except ApiError as refused:
            error = refused
        except (ClientGone, asyncio.CancelledError):
            raise
        except Exception:
            log.exception("request failed inside the coordinator")
            error = internal()
        if exchange.stream is None:
            raise error
        # A stream has begun: its status has been sent, so the error can only be an event.
        return await exchange.stream.end(error.event())

    async def _serve(self, exchange: Exchange) -> web.StreamResponse:
        path = exchange.place.path
        lost: EngineFailure | None = None
        while True:
            try:
                if exchange.stream is not None:
                    await migration.prepare(
                        exchange, self._client, path.target, self._config.timeouts.first_byte_s
                    )
                self._meter.count("routed", path.prefill or "", path.target)
                return await self._attempt(exchange, path)
            except (migration.CannotContinue, Differs) as reason:
                assert lost is not None, "only a stream that was lost is taken up"
                differs = isinstance(reason, Differs)
                return await self._break_off(exchange, lost, "replay_differs" if differs else str(reason))
            except EngineFailure as failure:
                lost = failure
                self._count(failure, path)
                exchange.failed_paths.append(path)
                if exchange.stream is None:
                    path = await self._retry(exchange, failure)
                    continue
                if exchange.journal.finished:  # only the end was missing
                    return await self._finish(exchange)
                reason_or_path = await self._migrate(exchange)
                if isinstance(reason_or_path, str):
                    return await self._break_off(exchange, failure, reason_or_path)
                path = reason_or_path

    async def _retry(self, exchange: Exchange, failure: EngineFailure) -> Path:
        """Another path for a request of which nothing has been sent yet, or the error that ends it."""
        if exchange.retries >= self._config.limits.max_retries:
            raise failure.as_api_error() from failure
        path = await self._wait_for_path(exchange)
        if path is None:
            raise no_path() from failure
        exchange.retries += 1
        self._meter.count("retries")
        exchange.trace.event("retry", reason=failure.kind, group=failure.group_id, path=str(path))
        log.info("%s; trying %s", failure, path)
        return path

    async def _migrate(self, exchange: Exchange) -> Path | str:
        """Another path for a stream that has begun, waiting for one if need be; or why it cannot go on."""
        reason = migration.obstacle(exchange, self._config.limits.max_migrations)
        if reason is not None:
            return reason
        path = await self._wait_for_path(exchange)
        if path is None:
            return "no_engine"
        exchange.migrations += 1
        self._meter.count("migrations")
        exchange.trace.event("migration", tokens=exchange.generated, path=str(path))
        if exchange.journal.record is not None:
            self._meter.count("replays")
        log.info("the stream goes on at %s after %d tokens", path, exchange.generated)
        return path

    async def _wait_for_path(self, exchange: Exchange) -> Path | None:
        """A path for a request that was lost, once there is one; None where engines stay away too long."""
        want = Want(one_engine=exchange.sent.obstacle is not None, size=self._size(exchange.request))
        clock = asyncio.get_running_loop().time
        since = clock()
        while not await self._desk.elsewhere(exchange.place, want, exchange.failed_paths):
            # In steps: that an engine is being started again may be said while this waits.
            if await self._desk.wait_for_change(min(self._config.limits.engine_wait_s, _STEP_S)):
                since = clock()
            elif clock() - since >= self._patience_s():
                return None
        return exchange.place.path

    def _patience_s(self) -> float:
        """How long a request that was lost waits for engines."""
        limits = self._config.limits
        returns = any(engine.returning for engine in self._desk.engines.values())
        return limits.restart_wait_s if returns else limits.engine_wait_s

    async def _finish(self, exchange: Exchange) -> web.StreamResponse:
        """Close a stream whose last token was sent before its engine was lost."""
        assert exchange.stream is not None
        return await exchange.stream.end(closing(exchange.request.body, exchange.journal))

    def _count(self, failure: EngineFailure, path: Path) -> None:
        self._desk.failed(failure, path)
        engine = self._desk.engines.get(failure.group_id)
        role = "retired" if engine is None else engine.endpoint.role
        self._meter.count("failures", failure.group_id, role, failure.kind)

    async def _break_off(self, exchange: Exchange, failure: EngineFailure, reason: str) -> web.StreamResponse:
        """End a stream that has begun with an error event: `[DONE]` would say that it is whole."""
        assert exchange.stream is not None
        self._meter.count("broken", reason)
        log.warning("the stream is broken off (%s): %s", reason, failure)
        return await exchange.stream.end(failure.as_api_error().event())

    async def _attempt(self, exchange: Exchange, path: Path) -> web.StreamResponse:
        request = exchange.sent
        if path.prefill is None:
            return await self._generate(exchange, path, request.raw)
        stream = self._first.stream(path.prefill, self._client.engine(path.target))
        if stream is not None:
            return await self._overlap(exchange, path, path.prefill, stream)
        handoff = await self._leg_1(exchange, path.prefill)
        if isinstance(handoff, web.Response):
            return self._refused(exchange, handoff, path.prefill)
        with exchange.trace.part("kv_handoff") as exchange.handoff:
            async with self._desk.turn(exchange.place, request.priority):
                return await self._generate(exchange, path, self._first.second_body(request, handoff))

    async def _leg_1(
        self, exchange: Exchange, group: str, key: str | None = None
    ) -> legs.Handoff | web.Response:
        with exchange.trace.part("leg_1", **_where(group, "prefill")) as part:
            return await self._first.run(exchange.sent, group, part, key)

    async def _overlap(
        self, exchange: Exchange, path: Path, prefill: str, stream: legs.Body
    ) -> web.StreamResponse:
        """Both legs at once: the decode engine reads the KV cache while it is computed."""
        key = uuid.uuid4().hex
        exchange.fetched = False
        exchange.trace.event("overlap", path=str(path))
        first = asyncio.create_task(self._leg_1(exchange, prefill, key))
        body = encode(legs.overlapped_body(exchange.sent.body, stream, key))
        second = asyncio.create_task(self._leg_2(exchange, path, body, first))
        try:
            await asyncio.wait((first, second), return_when=asyncio.FIRST_COMPLETED)
            if not second.done() and not exchange.fetched:
                left = first.result()  # leg 2 waits in vain for the cache of one that failed
                if isinstance(left, web.Response):
                    return self._refused(exchange, left, prefill)
                if exchange.sent.stream:  # in other answers the first token is not seen
                    exchange.handoff = exchange.trace.part("kv_handoff")
            return await second
        finally:
            exchange.handoff.end()
            first.cancel()
            second.cancel()
            await asyncio.gather(first, second, return_exceptions=True)

    async def _leg_2(
        self,
        exchange: Exchange,
        path: Path,
        body: bytes,
        first: asyncio.Task[legs.Handoff | web.Response],
    ) -> web.StreamResponse:
        """Leg 2 with this body; or, where the decode engine had no place before leg 1 was over, as ever."""
        async with self._desk.turn(exchange.place, exchange.sent.priority):
            if first.done() and isinstance(handoff := first.result(), legs.Handoff):
                body = self._first.second_body(exchange.sent, handoff)
            return await self._generate(exchange, path, body)

    async def _generate(self, exchange: Exchange, path: Path, body: bytes) -> web.StreamResponse:
        """Leg 2, or the only leg: the answer goes to the client."""
        request, timeouts = exchange.sent, self._config.timeouts
        began, engine = time.perf_counter(), self._client.engine(path.target)
        where = _where(path.target, engine.endpoint.role)
        part = exchange.trace.part("leg" if path.prefill is None else "leg_2", **where)
        with part:
            if not request.stream:
                exchange.handoff.end()  # when the first token comes is not seen
            async with self._client.call(path.target, path.prefill) as call:
                await call.open(request.endpoint, body, part.headers(request.headers), timeouts.first_byte_s)
                if call.status != 200 or not call.content_type.startswith("text/event-stream"):
                    content = await call.read(timeouts.first_byte_s)
                    if call.status != 200:
                        return self._refused(exchange, refusal(call, content, request), path.target)
                    if finished_with_error(content):
                        raise EngineFailure("finish_error", path.target, "the generation ended with an error")
                    response: web.StreamResponse = self._answer(exchange, path, call, content)
                else:
                    response = await self._relay(exchange, path, call)
        self._meter.time("leg_seconds", time.perf_counter() - began, path.target, engine.endpoint.role)
        self._observer.done(exchange, path, engine)
        return response

    def _refused(self, exchange: Exchange, refusal: web.Response, group: str) -> web.Response:
        if exchange.stream is not None:  # a continuation that the engine does not take
            raise EngineFailure("bad_answer", group, f"it refused to go on (HTTP {refusal.status})")
        return refusal

    def _answer(self, exchange: Exchange, path: Path, call: EngineCall, content: bytes) -> web.Response:
        exchange.prompt_tokens = prompt_tokens(content)
        exchange.answer_tokens = completion_tokens(content) or 0
        self._meter.count("output_tokens", by=exchange.answer_tokens)
        headers = {"Content-Type": call.content_type, **self._report(exchange, path)}
        return web.Response(status=200, body=content, headers=headers)

    async def _relay(self, exchange: Exchange, path: Path, call: EngineCall) -> web.StreamResponse:
        """Pass a stream on, block by block.

        The client's response starts with the first good block, not before: until then another engine can
        still take over unseen.
        """
        timeouts = self._config.timeouts
        first = await call.next_block(timeouts.first_byte_s)
        assert first is not None, "a stream ends after its first block"
        exchange.handoff.end()
        exchange.place.fetched()
        exchange.fetched = True
        shown = exchange.take(first)
        if exchange.stream is None:
            exchange.first_token_at = exchange.last_token_at
            headers = {"Content-Type": call.content_type, **self._report(exchange, path)}
            exchange.stream = await ClientStream.begin(exchange.http, headers, shown, timeouts.take_s)
        elif shown:
            exchange.stream.put(shown)
        stream = exchange.stream

        def sink(block: bytes) -> bool:
            shown = exchange.take(block)
            return (stream.put(shown) if shown else True) and not exchange.has_enough

        while not exchange.has_enough and not await call.pour(sink, timeouts.idle_s):
            await stream.room()
        if exchange.journal.prompt_ids:
            exchange.prompt_tokens = len(exchange.journal.prompt_ids)
        return await stream.end()

    def _report(self, exchange: Exchange, path: Path) -> dict[str, str]:
        headers = {REQUEST_ID: exchange.request.id}
        if exchange.http.headers.get(REPORT_HEADER):
            headers |= {"X-Hexgen2-Route": str(path), "X-Hexgen2-Retries": str(exchange.retries)}
        return headers


def _where(group: str, role: str) -> dict[str, str]:
    return {"hexgen2.group": group, "hexgen2.role": role}
