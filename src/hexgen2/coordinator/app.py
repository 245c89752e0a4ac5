"""The HTTP surface: routes, keys, errors as OpenAI bodies."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable
from importlib.metadata import PackageNotFoundError, version

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from hexgen2.coordinator import errors, live, openapi
from hexgen2.coordinator.admission import Admission
from hexgen2.coordinator.auth import ApiKeys
from hexgen2.coordinator.bodies import Bodies
from hexgen2.coordinator.calls import EngineClient
from hexgen2.coordinator.config import CoordinatorConfig
from hexgen2.coordinator.errors import ApiError
from hexgen2.coordinator.kv_totals import kv_transfer_totals
from hexgen2.coordinator.logs import current_request
from hexgen2.coordinator.metrics import Metrics
from hexgen2.coordinator.proxy import Proxy
from hexgen2.coordinator.request import REQUEST_ID, parse_request, request_id
from hexgen2.coordinator.tracing import Trace, Tracing

log = logging.getLogger(__name__)

_GENERATION = ("/v1/completions", "/v1/chat/completions")
_GUARDED = ("/v1/", "/tokenize", "/detokenize", live.STATE)
# Endpoints of vLLM's surface that a plan for generation does not serve: said clearly rather than as an
# unknown address.
_NOT_SERVED = (
    "/v1/embeddings",
    "/v1/responses",
    "/v1/audio/transcriptions",
    "/v1/audio/translations",
    "/v1/rerank",
)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Api:
    """The handlers, and the state that they share."""

    def __init__(
        self,
        config: CoordinatorConfig,
        client: EngineClient,
        metrics: Metrics,
        admission: Admission,
        keys: ApiKeys | None,
        tracing: Tracing,
        live_view: live.Live,
    ) -> None:
        self.config = config
        self.client = client
        self.metrics = metrics
        self.keys = keys
        self.admission = admission
        self._tracing = tracing
        self._live = live_view
        self.draining = False
        self.idle = asyncio.Event()
        self.idle.set()
        self._in_flight = 0
        self._proxy = Proxy(config, client, metrics)
        self._bodies = Bodies(config.limits.max_bodies_bytes, config.limits.max_body_bytes)
        self._started = int(time.time())

    def application(self) -> web.Application:
        app = web.Application(
            client_max_size=self.config.limits.max_body_bytes, middlewares=[self._errors, self._guard]
        )
        for path in _GENERATION:
            app.router.add_post(path, self.generate, expect_handler=_expect)
        for path in ("/tokenize", "/detokenize"):
            app.router.add_post(path, self.pass_on, expect_handler=_expect)
        for path in _NOT_SERVED:
            app.router.add_post(path, self.not_served, expect_handler=_expect)
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/v1/models/{model:.+}", self.model)
        app.router.add_get("/health", self.health)
        app.router.add_get("/metrics", self.show_metrics)
        app.router.add_get("/version", self.version)
        app.router.add_get("/openapi.json", self.openapi)
        live.add_routes(app, self._live, lambda: self._status, self.keys is not None)
        return app

    # Middlewares

    @web.middleware
    async def _errors(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Whatever goes wrong before the answer begins becomes an OpenAI error body."""
        try:
            return await handler(request)
        except ApiError as error:
            return _error_response(error)
        except web.HTTPRequestEntityTooLarge:
            return _error_response(errors.too_large(self.config.limits.max_body_bytes))
        except web.HTTPNotFound:
            return _error_response(errors.not_found(request.method, request.path))
        except web.HTTPMethodNotAllowed as refused:
            allowed = ", ".join(sorted(refused.allowed_methods))
            return _error_response(
                ApiError(405, f"Not allowed to {request.method} on {request.path}; use {allowed}.")
            )
        except web.HTTPException as refused:
            return _error_response(ApiError(refused.status, refused.reason))
        except (ConnectionError, asyncio.CancelledError):
            raise
        except Exception:
            log.exception("request failed inside the coordinator")
            return _error_response(errors.internal())

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if self.keys is not None and request.path.startswith(_GUARDED) and self._key(request) is None:
            raise errors.unauthorised()
        return await handler(request)

    def _key(self, request: web.Request) -> str | None:
        """The client's key by name; None without one that is known."""
        return self.keys.who(request.headers.get("Authorization")) if self.keys is not None else None

    # Generation

    async def generate(self, http: web.Request) -> web.StreamResponse:
        """/v1/completions and /v1/chat/completions."""
        if self.draining:
            raise errors.shutting_down()
        id_ = request_id(http.headers)
        marked = current_request.set(id_)
        self._enter()
        if self.metrics.listener is not None:
            self.metrics.listener.arrived()
        try:
            with self._tracing.request(http.headers, http.path, id_) as trace:
                return await self._generate(http, id_, trace)
        finally:
            self._leave()
            current_request.reset(marked)

    async def _generate(self, http: web.Request, id_: str, trace: Trace) -> web.StreamResponse:
        status = "cancelled"
        try:
            key = self._key(http) or ""
            self.admission.refuse_early(key)
            with self._bodies.held(http.content_length) as held:
                raw, names = await self._body(http), self.config.served_model_names
                held.resize(len(raw))
                request = parse_request(http.path, raw, http.headers, id_, names)
                with trace.part("queue") as queue:
                    async with self.admission.admitted(key, self._proxy.want(request)) as place:
                        queue.end()
                        response = await self._proxy.serve(http, request, place, trace)
            status = str(response.status)
            return response
        except ApiError as error:
            status = str(error.status)
            error.request_id = id_
            raise
        except (asyncio.CancelledError, ConnectionError):
            self.metrics.cancelled.inc()
            raise
        except errors.ClientGone:
            self.metrics.cancelled.inc()
            return web.Response(status=499)  # nobody reads it
        finally:
            self.metrics.requests.labels(http.path, status).inc()
            trace.note(**{"hexgen2.status": status})

    async def _body(self, http: web.Request) -> bytes:
        """The whole request body, received within its time."""
        limit_s = self.config.timeouts.body_s
        try:
            async with asyncio.timeout(limit_s):
                return await http.read()
        except TimeoutError:
            raise errors.body_too_slow(limit_s) from None

    def _enter(self) -> None:
        self._in_flight += 1
        self.idle.clear()
        self.metrics.in_flight.set(self._in_flight)

    def _leave(self) -> None:
        self._in_flight -= 1
        self.metrics.in_flight.set(self._in_flight)
        if self._in_flight == 0:
            self.idle.set()

    async def pass_on(self, http: web.Request) -> web.Response:
        """/tokenize and /detokenize: any engine knows, and the answer is small."""
        request = parse_request(
            http.path,
            await self._body(http),
            http.headers,
            request_id(http.headers),
            self.config.served_model_names,
        )
        engine = self.client.fleet.any_engine()
        if engine is None:
            raise errors.no_path()
        try:
            async with self.client.call(engine.id) as call:
                within = self.config.timeouts.idle_s
                await call.open(request.endpoint, request.raw, request.headers, within)
                content = await call.read(within)
        except errors.EngineFailure as failure:
            raise failure.as_api_error() from failure
        return web.Response(status=call.status, body=content, headers={"Content-Type": call.content_type})

    async def not_served(self, http: web.Request) -> web.Response:
        message = f"{http.path} is not served: this plan is for /v1/completions and /v1/chat/completions."
        raise ApiError(404, message, code="endpoint_not_served")

    # What the service says about itself

    def _card(self, name: str) -> dict[str, object]:
        lengths = [e.max_model_len for e in self.client.fleet.engines.values() if e.max_model_len is not None]
        return {
            "id": name,
            "object": "model",
            "created": self._started,
            "owned_by": "hexgen2",
            "root": self.config.served_model_names[0],
            "parent": None,
            "max_model_len": min(lengths, default=None),
        }

    async def models(self, _: web.Request) -> web.Response:
        cards = [self._card(name) for name in self.config.served_model_names]
        return web.json_response({"object": "list", "data": cards})

    async def model(self, http: web.Request) -> web.Response:
        name = http.match_info["model"]
        if name not in self.config.served_model_names:
            raise errors.unknown_model(name)
        return web.json_response(self._card(name))

    @property
    def _status(self) -> str:
        """ok, draining or unavailable."""
        return "draining" if self.draining else "ok" if self.client.fleet.paths_up > 0 else "unavailable"

    async def health(self, _: web.Request) -> web.Response:
        """200 only while new requests can be served: at least one whole path is up and no shut-down has
        begun.
        """
        fleet, state = self.client.fleet, self._status
        engines = {
            engine.id: {
                "role": engine.endpoint.role,
                "up": engine.up,
                "reason": engine.reason,
                "breaker": fleet.breakers[engine.id].state(time.monotonic()),
                "in_flight": engine.in_flight,
            }
            for engine in fleet.engines.values()
        }
        body = {
            "status": state,
            "paths_up": fleet.paths_up,
            "paths": len(fleet.planned.paths),
            "engines": engines,
        }
        return web.json_response(body, status=200 if state == "ok" else 503)

    async def show_metrics(self, _: web.Request) -> web.Response:
        urls = {engine.id: engine.endpoint.url for engine in self.client.fleet.engines.values() if engine.up}
        totals = await kv_transfer_totals(urls, self.client.probes, timeout_s=1.0)
        return web.Response(body=self.metrics.render(totals), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def version(self, _: web.Request) -> web.Response:
        return web.json_response({"version": _version()})

    async def openapi(self, _: web.Request) -> web.Response:
        names = self.config.served_model_names
        return web.json_response(openapi.document(names, _version(), self.keys is not None))


async def _expect(request: web.Request) -> web.Response | None:
    """`Expect: 100-continue` (curl sends it with large bodies) is answered; nothing else can be expected.

    aiohttp's own handler repeats the header, and fails where that is not UTF-8.
    """
    if request.headers.get("Expect", "").lower() != "100-continue":
        return _error_response(ApiError(417, "Only 100-continue may be expected."))
    await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    request.writer.output_size = 0  # the answer has not begun yet
    return None


def _version() -> str:
    try:
        return version("hexgen2")
    except PackageNotFoundError:
        return "unknown"


def _error_response(error: ApiError) -> web.Response:
    headers = {"Content-Type": "application/json"}
    if error.request_id is not None:
        headers[REQUEST_ID] = error.request_id
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, round(error.retry_after_s)))
    return web.Response(status=error.status, body=json.dumps(error.body()).encode(), headers=headers)
