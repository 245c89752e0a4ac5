"""The HTTP surface: generation, and what the service says about itself."""

from __future__ import annotations

import time
from importlib.metadata import PackageNotFoundError, version

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from hexgen2.coordinator import errors, live, openapi
from hexgen2.coordinator.client import EngineClient
from hexgen2.coordinator.config import CoordinatorConfig
from hexgen2.coordinator.errors import ApiError
from hexgen2.coordinator.fleet import Fleet
from hexgen2.coordinator.generation import Generation
from hexgen2.coordinator.kv_totals import kv_transfer_totals
from hexgen2.coordinator.metrics import Metrics
from hexgen2.coordinator.request import parse_request, request_id
from hexgen2.coordinator.surface import Surface, expect

# Endpoints of vLLM's surface that a plan for generation does not serve: said clearly rather than as an
# unknown address.
_NOT_SERVED = (
    "/v1/embeddings",
    "/v1/responses",
    "/v1/audio/transcriptions",
    "/v1/audio/translations",
    "/v1/rerank",
)


class Api:
    """The handlers, and the state that they share."""

    def __init__(
        self,
        config: CoordinatorConfig,
        client: EngineClient,
        fleet: Fleet,
        metrics: Metrics,
        surface: Surface,
        generation: Generation,
        live_view: live.Live,
    ) -> None:
        self.config = config
        self.client = client
        self.metrics = metrics
        self.generation = generation
        self._fleet = fleet
        self._live = live_view
        self._surface = surface
        self._started = int(time.time())

    def application(self) -> web.Application:
        app = self._surface.application()
        self.generation.add_to(app)
        for path in ("/tokenize", "/detokenize"):
            app.router.add_post(path, self.pass_on, expect_handler=expect)
        for path in _NOT_SERVED:
            app.router.add_post(path, self.not_served, expect_handler=expect)
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/v1/models/{model:.+}", self.model)
        app.router.add_get("/health", self.health)
        app.router.add_get("/metrics", self.show_metrics)
        app.router.add_get("/version", self.version)
        app.router.add_get("/openapi.json", self.openapi)
        live.add_routes(app, self._live, lambda: self._status, self._surface.keys is not None)
        return app

    async def pass_on(self, http: web.Request) -> web.Response:
        """/tokenize and /detokenize: any engine knows, and the answer is small."""
        request = parse_request(
            http.path,
            await self._surface.body(http),
            http.headers,
            request_id(http.headers),
            self.config.served_model_names,
        )
        engine = self._fleet.any_engine()
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
        lengths = [e.max_model_len for e in self._fleet.engines.values() if e.max_model_len is not None]
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
        return "draining" if self.generation.draining else "ok" if self._fleet.paths_up > 0 else "unavailable"

    async def health(self, _: web.Request) -> web.Response:
        """200 only while new requests can be served: at least one whole path is up and no shut-down has
        begun.
        """
        fleet, state = self._fleet, self._status
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
        urls = {engine.id: engine.endpoint.url for engine in self._fleet.engines.values() if engine.up}
        totals = await kv_transfer_totals(urls, self.client.probes, timeout_s=1.0)
        return web.Response(body=self.metrics.render(totals), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def version(self, _: web.Request) -> web.Response:
        return web.json_response({"version": _version()})

    async def openapi(self, _: web.Request) -> web.Response:
        names = self.config.served_model_names
        return web.json_response(openapi.document(names, _version(), self._surface.keys is not None))


def _version() -> str:
    try:
        return version("hexgen2")
    except PackageNotFoundError:
        return "unknown"
