"""/v1/completions and /v1/chat/completions: from the client's request to its whole answer."""

from __future__ import annotations

import asyncio

from aiohttp import web

from hexgen2.coordinator import errors
from hexgen2.coordinator.bodies import Bodies
from hexgen2.coordinator.client import EngineClient
from hexgen2.coordinator.config import CoordinatorConfig
from hexgen2.coordinator.desk import Meter
from hexgen2.coordinator.errors import ApiError
from hexgen2.coordinator.logs import current_request
from hexgen2.coordinator.proxy import Proxy
from hexgen2.coordinator.request import parse_request, request_id
from hexgen2.coordinator.surface import GENERATION, Surface, expect
from hexgen2.coordinator.tracing import Trace, Tracing

# Whoever has no chance is refused before the body is read, unless that is read as soon as it is asked.
_SMALL_BYTES = 2**16


class Generation:
    """The handler, and the count of what it serves."""

    def __init__(
        self,
        config: CoordinatorConfig,
        client: EngineClient,
        meter: Meter,
        surface: Surface,
        tracing: Tracing,
    ) -> None:
        self._config = config
        self._desk = client.desk
        self._meter = meter
        self._surface = surface
        self._tracing = tracing
        self._proxy = Proxy(config, client, meter)
        self._bodies = Bodies(config.limits.max_bodies_bytes, config.limits.max_body_bytes)
        self._in_flight = 0
        self.draining = False
        self.idle = asyncio.Event()
        self.idle.set()

    def add_to(self, app: web.Application) -> None:
        for path in GENERATION:
            app.router.add_post(path, self.generate, expect_handler=expect)

    async def generate(self, http: web.Request) -> web.StreamResponse:
        """/v1/completions and /v1/chat/completions."""
        if self.draining:
            raise errors.shutting_down()
        id_ = request_id(http.headers)
        marked = current_request.set(id_)
        self._enter()
        self._meter.arrived()
        try:
            with self._tracing.request(http.headers, http.path, id_) as trace:
                return await self._generate(http, id_, trace)
        finally:
            self._leave()
            current_request.reset(marked)

    async def _generate(self, http: web.Request, id_: str, trace: Trace) -> web.StreamResponse:
        status = "cancelled"
        try:
            key = self._surface.key(http) or ""
            if (http.content_length or _SMALL_BYTES + 1) > _SMALL_BYTES:
                await self._desk.knock(key)
            with self._bodies.held(http.content_length) as held:
                raw, names = await self._surface.body(http), self._config.served_model_names
                held.resize(len(raw))
                request = parse_request(http.path, raw, http.headers, id_, names)
                with trace.part("queue") as queue:
                    async with self._desk.admitted(key, self._proxy.want(request)) as place:
                        queue.end()
                        response = await self._proxy.serve(http, request, place, trace)
            status = str(response.status)
            return response
        except ApiError as error:
            status = str(error.status)
            error.request_id = id_
            raise
        except web.HTTPException as error:  # a body that is too large
            status = str(error.status)
            raise
        except (asyncio.CancelledError, ConnectionError):
            self._meter.count("cancelled")
            raise
        except errors.ClientGone:
            self._meter.count("cancelled")
            return web.Response(status=499)  # nobody reads it
        except Exception:
            status = "500"
            raise
        finally:
            self._meter.count("requests", http.path, status)
            trace.note(**{"hexgen2.status": status})

    def _enter(self) -> None:
        self._in_flight += 1
        self.idle.clear()
        self._meter.serving(self._in_flight)

    def _leave(self) -> None:
        self._in_flight -= 1
        self._meter.serving(self._in_flight)
        if self._in_flight == 0:
            self.idle.set()
