"""`python -m hexgen2.coordinator.workers CONTROL LISTEN...`: a worker, which the owner starts."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from contextlib import AsyncExitStack
from typing import Any

from aiohttp import web

from hexgen2.coordinator import logs
from hexgen2.coordinator.client import EngineClient
from hexgen2.coordinator.descriptors import raise_limit
from hexgen2.coordinator.generation import Generation
from hexgen2.coordinator.loop import run
from hexgen2.coordinator.reload import Reloader
from hexgen2.coordinator.surface import Surface
from hexgen2.coordinator.tls import trusting
from hexgen2.coordinator.workers.forward import Forwarder
from hexgen2.coordinator.workers.remote import RemoteDesk, RemoteMeter
from hexgen2.coordinator.workers.settings import WorkerSettings
from hexgen2.coordinator.workers.wire import Message, Wire


class Worker:
    """Serves clients until it is told to end, or its owner is gone."""

    def __init__(self) -> None:
        self.wire = Wire(self._take, self._orphaned)
        self._desk = RemoteDesk(self.wire)
        self._told: asyncio.Future[WorkerSettings] = asyncio.get_running_loop().create_future()
        self._reloader = Reloader([])
        self._orphan = False
        self._stop = asyncio.Event()

    def end(self) -> None:
        """Accept nobody any more; what runs may finish."""
        self._stop.set()

    def _orphaned(self) -> None:
        # Nobody gives places any more, and engines end with their owner too.
        self._orphan = True
        self._stop.set()
        if not self._told.done():
            self._told.cancel()

    def _take(self, message: Message) -> None:
        kind, *rest = message
        done: dict[str, Any] = {
            "granted": self._desk.granted,
            "failed": self._desk.refused,
            "engines": self._desk.told,
            "down": self._desk.went_down,
            "settings": lambda text: self._told.set_result(WorkerSettings.model_validate_json(text)),
            "ping": lambda: self.wire.send("pong"),
            "drain": self.end,
            "reload": lambda: self._reloader.look(force=True),
        }
        done[kind](*rest)

    async def serve(self, control: socket.socket, listen: list[socket.socket]) -> None:
        await self.wire.open(control)
        settings = await self._told
        logs.configure(settings.log_level, settings.log_json)
        raise_limit()
        keys, tls, tracing = settings.keys(), settings.tls(), settings.tracing()
        surface, meter = Surface(settings.config, keys), RemoteMeter(self.wire)
        config = settings.config
        client = EngineClient(self._desk, config.timeouts, trusting(config.engine_ca_file))
        generation = Generation(config, client, meter, surface, tracing)
        forwarder = Forwarder(settings.owner, surface)
        app = surface.application()
        generation.add_to(app)
        forwarder.add_to(app)
        runner = surface.runner(app)
        self._reloader = Reloader([thing for thing in (keys, tls) if thing is not None])
        async with AsyncExitStack() as stack:
            stack.push_async_callback(asyncio.to_thread, tracing.close)
            for part in (client, forwarder):
                await part.start()
                stack.push_async_callback(part.close)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            assert runner.server is not None, "set up"
            heads = surface.heads.watch(runner.server)
            for running in (self._reloader.run(), self._desk.tell_heard(), heads):
                stack.callback(asyncio.create_task(running).cancel)
            context = None if tls is None else tls.context
            sites = [web.SockSite(runner, one, backlog=2048, ssl_context=context) for one in listen]
            for site in sites:
                await site.start()
            self.wire.send("ready")
            await self._stop.wait()
            generation.draining = True
            for site in sites:
                await site.stop()
            if not self._orphan:
                await generation.idle.wait()  # the owner knows for how long, and kills
        self.wire.close()


async def _main(control: int, listen: list[int]) -> None:
    worker, loop = Worker(), asyncio.get_running_loop()
    # Ctrl-C reaches the owner too, which tells us what to do.
    loop.add_signal_handler(signal.SIGINT, lambda: None)
    loop.add_signal_handler(signal.SIGTERM, worker.end)
    await worker.serve(socket.socket(fileno=control), [socket.socket(fileno=number) for number in listen])


if __name__ == "__main__":
    run(_main(int(sys.argv[1]), [int(number) for number in sys.argv[2:]]))
