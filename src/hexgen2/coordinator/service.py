"""The coordinator's life: start, serve, drain, stop."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import time
from collections.abc import AsyncIterator

from aiohttp import web

from hexgen2.coordinator.admission import Admission, AdmissionLimits
from hexgen2.coordinator.app import Api
from hexgen2.coordinator.auth import ApiKeys
from hexgen2.coordinator.calls import EngineClient
from hexgen2.coordinator.config import CoordinatorConfig
from hexgen2.coordinator.desk import LocalDesk
from hexgen2.coordinator.fleet import Fleet
from hexgen2.coordinator.generation import Generation
from hexgen2.coordinator.health import HealthWatch
from hexgen2.coordinator.live import Live
from hexgen2.coordinator.metrics import Metrics
from hexgen2.coordinator.reload import Reloader
from hexgen2.coordinator.surface import Surface
from hexgen2.coordinator.tls import Tls
from hexgen2.coordinator.tracing import Tracing
from hexgen2.specs.errors import InputError

log = logging.getLogger(__name__)

# How long requests may take to leave an engine that is declared down.
_LAST_S = 5.0


class Coordinator:
    """The front door of a plan, to be embedded in an event loop:

        async with Coordinator(config).running("127.0.0.1", 8000) as coordinator:
            print(coordinator.url)
            ...

    Leaving the block drains: no new requests, those that run may finish within `timeouts.drain_s`.
    """

    def __init__(
        self,
        config: CoordinatorConfig,
        api_keys: ApiKeys | None = None,
        tls: Tls | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self.config = config
        self.fleet = Fleet(config)
        limits = config.limits
        self.admission = Admission(
            self.fleet,
            AdmissionLimits(
                queue=limits.max_queue, wait_s=limits.queue_wait_s, per_key=limits.max_in_flight_per_key
            ),
        )
        self.fleet.on_change = self.admission.refill
        self.metrics = Metrics(self.fleet, self.admission)
        self.live = Live(self.fleet, self.metrics, lambda: self.config)
        """What the live page shows."""
        self._client = EngineClient(LocalDesk(self.fleet, self.admission), config.timeouts)
        self._health = HealthWatch(config, self._client, self.fleet)
        self._keys = api_keys
        self._tls = tls
        self._tracing = tracing or Tracing()
        self._reloader = Reloader([])
        self._reloading: asyncio.Task[None] | None = None
        self._api: Api | None = None
        self._runner: web.AppRunner | None = None
        self._site: web.TCPSite | None = None
        self._host = ""

    @property
    def url(self) -> str:
        """The address it listens on (with the real port where 0 was asked for)."""
        assert self._runner is not None, "the coordinator is not running"
        host = "127.0.0.1" if self._host in ("0.0.0.0", "::", "") else self._host
        scheme = "http" if self._tls is None else "https"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{self._runner.addresses[0][1]}"

    # What whoever runs the engines tells and asks

    def engine_ended(self, group_id: str) -> None:
        """A process of this engine has ended: take it out now, not with the next health poll. An engine that is
        not in the config (not yet, or not any more) is left alone, here and below."""
        engine = self.fleet.engines.get(group_id)
        if engine is not None:
            self.fleet.mark_down(engine, "its process ended")

    def engine_restarts(self, group_id: str) -> None:
        """The engine is being started again; what its predecessor did is not held against it."""
        engine = self.fleet.engines.get(group_id)
        if engine is not None:
            self.metrics.restarts.labels(group_id, engine.endpoint.role).inc()
            self.fleet.forgive(group_id)

    async def update(self, config: CoordinatorConfig) -> None:
        """Serve by another config from now on: other shares, roles, engines or routes; time-outs, limits and
        names stay. Requests under way go on where they are.

        Engines that it does not name get no new requests; `retire` waits for those that they have. New ones are
        asked for their health before anything changes, so that those which answer serve at once.
        """
        await asyncio.gather(*map(self._health.poll, self.fleet.meet(config)))
        self.config = self.config.model_copy(
            update={"engines": config.engines, "routes": config.routes, "classes": config.classes}
        )
        self.fleet.update(self.config)
        if self._api is not None:
            self._health.follow()

    async def retire(self, group_id: str, within_s: float) -> bool:
        """Wait until an engine that the config does not name any more has nothing to do, then drop it; whether
        it came to that. After ``within_s`` its streams are taken up by other engines."""
        engine = self.fleet.engines[group_id]
        try:
            async with asyncio.timeout(within_s):
                await engine.free.wait()
            return True
        except TimeoutError:
            self.fleet.mark_down(engine, "it is taken out of service", silent=True)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LAST_S):
                    await engine.free.wait()
            return False
        finally:
            self.fleet.forget(group_id)
            self._health.follow()

    def silent_for(self, group_id: str) -> float:
        """For how many seconds an engine has been down; 0 while it is up."""
        engine = self.fleet.engines.get(group_id)
        return 0.0 if engine is None else engine.down_for(time.monotonic())

    @contextlib.asynccontextmanager
    async def running(
        self, host: str = "127.0.0.1", port: int = 0, api_keys: ApiKeys | None = None
    ) -> AsyncIterator[Coordinator]:
        """Serve inside the block. InputError where the port is taken."""
        if api_keys is not None:
            self._keys = api_keys
        await self.start(host, port)
        try:
            yield self
        finally:
            await self.stop()

    async def start(self, host: str, port: int) -> None:
        surface = Surface(self.config, self._keys)
        generation = Generation(self.config, self._client, self.metrics, surface, self._tracing)
        self._api = Api(self.config, self._client, self.fleet, self.metrics, surface, generation, self.live)
        await self._client.start()
        self._runner = web.AppRunner(
            self._api.application(), handler_cancellation=True, access_log=None, shutdown_timeout=1.0
        )
        try:
            await self._runner.setup()
            context = None if self._tls is None else self._tls.context
            self._site = web.TCPSite(self._runner, host, port, backlog=2048, ssl_context=context)
            await self._health.start()
            self.live.start(self._client.probes)
            await self._site.start()
        except OSError as error:
            await self._close()
            if error.errno == errno.EADDRINUSE:
                raise InputError("--port", "", f"port {port} on {host} is in use", "give a free one") from None
            problem = f"cannot listen on {host}:{port} ({error.strerror or error})"
            raise InputError("--host", "", problem, "give an address of this machine") from None
        self._host = host
        self._reloader = Reloader([thing for thing in (self._keys, self._tls) if thing is not None])
        self._reloading = asyncio.create_task(self._reloader.run(), name="reloader")
        log.info("coordinator listens on %s", self.url)

    async def drain(self) -> bool:
        """Refuse new requests and wait for those that run, `timeouts.drain_s` at most; whether all finished."""
        assert self._api is not None, "the coordinator is not running"
        self._api.generation.draining = True
        if self._site is not None:
            await self._site.stop()
            self._site = None
        try:
            async with asyncio.timeout(self.config.timeouts.drain_s):
                await self._api.generation.idle.wait()
        except TimeoutError:
            log.warning("requests were still running after %g s and are cut off", self.config.timeouts.drain_s)
            return False
        return True

    async def stop(self) -> None:
        """Drain, then close everything."""
        if self._api is not None:
            await self.drain()
        await self._close()

    def reload(self) -> None:
        """Read API keys and certificate again now (SIGHUP); without it they are looked at once a second."""
        self._reloader.look(force=True)

    async def _close(self) -> None:
        if self._reloading is not None:
            self._reloading.cancel()
            await asyncio.wait((self._reloading,))
            self._reloading = None
        await self.live.stop()
        await self._health.stop()
        if self._runner is not None:
            await self._runner.cleanup()
        await self._client.close()
        await asyncio.to_thread(self._tracing.close)
        self._api = self._runner = self._site = None
