"""The coordinator's life: start, serve, drain, stop."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import tempfile
import time
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

from aiohttp import web

from hexgen2.coordinator import logs
from hexgen2.coordinator.admission import Admission, AdmissionLimits
from hexgen2.coordinator.app import Api
from hexgen2.coordinator.auth import ApiKeys
from hexgen2.coordinator.client import EngineClient
from hexgen2.coordinator.config import CoordinatorConfig
from hexgen2.coordinator.descriptors import raise_limit
from hexgen2.coordinator.desk import LocalDesk
from hexgen2.coordinator.fleet import Fleet
from hexgen2.coordinator.generation import Generation
from hexgen2.coordinator.health import HealthWatch
from hexgen2.coordinator.live import Live
from hexgen2.coordinator.metrics import Metrics
from hexgen2.coordinator.reload import Reloader
from hexgen2.coordinator.surface import Surface
from hexgen2.coordinator.tls import Tls, trusting
from hexgen2.coordinator.tracing import Tracing
from hexgen2.coordinator.workers import Workers, WorkerSettings, listening
from hexgen2.specs.errors import InputError

log = logging.getLogger(__name__)

# How long requests may take to leave an engine that is declared down.
_LAST_S = 5.0
# What keeps this machine from starting a process or opening a socket, whatever the address.
_LACKS = frozenset({errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class Coordinator:
    """The front door of a plan, to be embedded in an event loop:

        async with Coordinator(config).running("127.0.0.1", 8000) as coordinator:
            print(coordinator.url)
            ...

    Leaving the block drains: no new requests, those that run may finish within `timeouts.drain_s`. With several
    `workers` as many processes serve, and this one owns what they share (`workers/`).
    """

    def __init__(
        self,
        config: CoordinatorConfig,
        api_keys: ApiKeys | None = None,
        tls: Tls | None = None,
        tracing: Tracing | None = None,
        workers: int = 1,
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
        self._desk = LocalDesk(self.fleet, self.admission)
        self._client = EngineClient(self._desk, config.timeouts, trusting(config.engine_ca_file))
        self._health = HealthWatch(config, self._client, self.fleet)
        self._keys = api_keys
        self._tls = tls
        self._tracing = tracing or Tracing()
        self._reloader = Reloader([])
        self._background: list[asyncio.Task[None]] = []
        self._api: Api | None = None
        self._runner: web.AppRunner | None = None
        self._site: web.BaseSite | None = None
        self._number = workers
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self.workers: Workers | None = None
        self._host, self._port = "", 0

    @property
    def url(self) -> str:
        """The address it listens on (with the real port where 0 was asked for)."""
        assert self._runner is not None, "the coordinator is not running"
        host = "127.0.0.1" if self._host in ("0.0.0.0", "::", "") else self._host
        scheme = "http" if self._tls is None else "https"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{self._port}"

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
            self.fleet.returns(group_id, True)

    def engine_given_up(self, group_id: str) -> None:
        """The engine is not started again: who waits for it must not."""
        if group_id in self.fleet.engines:
            self.fleet.returns(group_id, False)

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
        """Serve inside the block. InputError where the port is taken or workers are too many for this machine,
        WorkersFailed where one of them does not come up."""
        if api_keys is not None:
            self._keys = api_keys
        await self.start(host, port)
        try:
            yield self
        finally:
            await self.stop()

    async def start(self, host: str, port: int) -> None:
        raise_limit()
        surface = Surface(self.config, self._keys)
        generation = Generation(self.config, self._client, self.metrics, surface, self._tracing)
        self._api = Api(self.config, self._client, self.fleet, self.metrics, surface, generation, self.live)
        await self._client.start()
        self._runner = surface.runner(self._api.application())
        try:
            await self._runner.setup()
            await self._health.start()
            self.live.start(self._client.probes)
            if self._number == 1:
                context = None if self._tls is None else self._tls.context
                self._site = web.TCPSite(self._runner, host, port, backlog=2048, ssl_context=context)
                await self._site.start()
                self._port = self._runner.addresses[0][1]
            else:
                await self._start_workers(host, port)
        except OSError as error:
            await self._close()
            raise _cannot_start(error, host, port, self._number) from None
        except BaseException:
            await self._close()
            raise
        self._host = host
        self._reloader = Reloader([thing for thing in (self._keys, self._tls) if thing is not None])
        assert self._runner.server is not None, "set up"
        self._background = [
            asyncio.create_task(self._reloader.run(), name="reloader"),
            asyncio.create_task(surface.heads.watch(self._runner.server), name="heads"),
        ]
        log.info("coordinator listens on %s", self.url)

    async def _start_workers(self, host: str, port: int) -> None:
        """They accept clients; this process answers at a Unix socket what they do not know themselves."""
        assert self._runner is not None, "set up"
        sockets = listening(host, port, self._number)
        self._port = sockets[0][0].getsockname()[1]
        self._folder = tempfile.TemporaryDirectory(prefix="hexgen2-")  # for this user only
        owner = Path(self._folder.name, "owner")
        self._site = web.UnixSite(self._runner, owner)
        await self._site.start()
        level, as_json = logs.configured()
        settings = WorkerSettings(
            config=self.config,
            owner=owner,
            key_digests=None if self._keys is None else tuple(one.hex() for one in self._keys.digests),
            key_files=() if self._keys is None else self._keys.files,
            tls_files=None if self._tls is None else self._tls.files,
            otlp_traces_endpoint=self._tracing.endpoint,
            log_level=level,
            log_json=as_json,
        )
        self.workers = Workers(settings, sockets, self.fleet, self._desk, self.metrics)
        await self.workers.start()

    async def drain(self) -> bool:
        """Refuse new requests and wait for those that run, `timeouts.drain_s` at most; whether all finished."""
        assert self._api is not None, "the coordinator is not running"
        self._api.generation.draining = True
        limit_s = self.config.timeouts.drain_s
        if self.workers is not None:
            finished = await self.workers.drain(limit_s)
        else:
            if self._site is not None:
                await self._site.stop()
                self._site = None
            finished = await _within(limit_s, self._api.generation.idle.wait())
        if not finished:
            log.warning("requests were still running after %g s and are cut off", limit_s)
        return finished

    async def stop(self) -> None:
        """Drain, then close everything."""
        if self._api is not None:
            await self.drain()
        await self._close()

    def reload(self) -> None:
        """Read API keys and certificate again now (SIGHUP); without it they are looked at once a second."""
        self._reloader.look(force=True)
        if self.workers is not None:
            self.workers.reload()

    async def _close(self) -> None:
        for task in self._background:
            task.cancel()
            await asyncio.wait((task,))
        self._background = []
        await self.live.stop()
        if self.workers is not None:
            await self.workers.stop()
            self.workers = None
        await self._health.stop()
        if self._runner is not None:
            await self._runner.cleanup()
        await self._client.close()
        await asyncio.to_thread(self._tracing.close)
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
        self._api = self._runner = self._site = None


def _cannot_start(error: OSError, host: str, port: int, workers: int) -> InputError:
    reason = error.strerror or str(error)
    if error.errno == errno.EADDRINUSE:
        return InputError("--port", "", f"port {port} on {host} is in use", "give a free one")
    if error.errno in _LACKS:
        problem = f"{workers} cannot be started here ({reason})"
        return InputError("--workers", "", problem, "give fewer, or raise the limit (`ulimit -a`)")
    problem = f"cannot listen on {host}:{port} ({reason})"
    return InputError("--host", "", problem, "give an address of this machine")


async def _within(seconds: float, waiting: Coroutine[Any, Any, object]) -> bool:
    """Whether it ended in time."""
    try:
        async with asyncio.timeout(seconds):
            await waiting
    except TimeoutError:
        return False
    return True
