"""The worker's side: a desk and a meter that ask and tell the owner."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from typing import Any

from hexgen2.coordinator.config import EngineEndpoint
from hexgen2.coordinator.desk import Counted, Held, Timed
from hexgen2.coordinator.engine import Engine
from hexgen2.coordinator.errors import EngineFailure
from hexgen2.coordinator.fleet import Want
from hexgen2.coordinator.traffic import Served
from hexgen2.coordinator.workers.wire import Wire, error_in, error_out, path_in, path_out, want_out
from hexgen2.specs.routing import Path

_TELL_HEARD_S = 0.25


class RemotePlace:
    """A place that the owner holds for us."""

    def __init__(self, wire: Wire, id_: int, path: Path) -> None:
        self._wire = wire
        self.id = id_
        self.path = path
        self._fetched = False

    def fetched(self) -> None:
        if not self._fetched:
            self._fetched = True
            self._wire.send("fetched", self.id)

    def moved(self, path: Path) -> None:
        self.path, self._fetched = path, False


class RemoteDesk:
    """Copies of the engines, kept by the owner's word, and questions to it."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._ids = itertools.count()
        self._asked: dict[int, asyncio.Future[Any]] = {}
        self._came_up = asyncio.Event()
        self.engines: dict[str, Engine] = {}
        self.by_class = False

    # What the owner says

    def granted(self, id_: int, given: Any) -> None:
        future = self._asked.get(id_)
        if future is not None and not future.done():
            future.set_result(given)

    def refused(self, id_: int, error: list[Any]) -> None:
        future = self._asked.get(id_)
        if future is not None and not future.done():
            future.set_exception(error_in(error))

    def told(self, rows: list[list[Any]], by_class: bool) -> None:
        """The engines as they are now."""
        self.by_class = by_class
        rose, named = False, set()
        for given, up, reason, lives, length, returning in rows:
            endpoint = EngineEndpoint.model_validate(given)
            engine = self.engines.setdefault(endpoint.group_id, Engine(endpoint))
            # Other roles are other paths: who waits for one looks again.
            rose = rose or (up and not engine.up) or engine.endpoint.role != endpoint.role
            engine.endpoint, engine.up, engine.reason = endpoint, up, reason
            engine.lives, engine.max_model_len, engine.returning = lives, length, returning
            named.add(endpoint.group_id)
        for group in set(self.engines).difference(named):
            del self.engines[group]
        if rose:
            self._came_up.set()
            self._came_up = asyncio.Event()

    def went_down(self, group: str, reason: str, silent: bool) -> None:
        engine = self.engines.get(group)
        if engine is not None:
            engine.up, engine.reason = False, reason
            engine.end_work(reason, silent)

    async def tell_heard(self) -> None:
        """Tell now and then which engines have been heard of; until cancelled."""
        told: dict[str, float] = {}
        while True:
            await asyncio.sleep(_TELL_HEARD_S)
            news = {
                group: engine.heard_at
                for group, engine in self.engines.items()
                if engine.heard_at > told.get(group, 0.0)
            }
            if news:
                told |= news
                self._wire.send("heard", news)

    # What requests ask

    async def _ask(self, kind: str, *rest: Any) -> Any:
        id_ = next(self._ids)
        future = self._asked[id_] = asyncio.get_running_loop().create_future()
        self._wire.send(kind, id_, *rest)
        try:
            return await future
        finally:
            del self._asked[id_]

    @asynccontextmanager
    async def _held(self, kind: str, *rest: Any) -> AsyncIterator[tuple[int, Any]]:
        id_ = next(self._ids)
        future = self._asked[id_] = asyncio.get_running_loop().create_future()
        self._wire.send(kind, id_, *rest)
        try:
            yield id_, await future
        finally:
            del self._asked[id_]
            self._wire.send("leave", id_)

    async def knock(self, key: str) -> None:
        await self._ask("knock", key)

    @asynccontextmanager
    async def admitted(self, key: str, want: Want) -> AsyncIterator[RemotePlace]:
        async with self._held("enter", key, want_out(want)) as (id_, path):
            yield RemotePlace(self._wire, id_, path_in(path))

    async def elsewhere(self, held: Held, want: Want, avoid: Collection[Path]) -> bool:
        assert isinstance(held, RemotePlace)
        path = await self._ask("elsewhere", held.id, want_out(want), [path_out(one) for one in avoid])
        if path is not None:
            held.moved(path_in(path))
        return path is not None

    async def wait_for_change(self, within_s: float) -> bool:
        try:
            async with asyncio.timeout(within_s):
                await self._came_up.wait()
        except TimeoutError:
            return False
        return True

    @asynccontextmanager
    async def turn(self, held: Held, priority: int) -> AsyncIterator[None]:
        assert isinstance(held, RemotePlace)
        async with self._held("turn", held.id, priority):
            yield

    def leg(self, engine: Engine, by: int) -> None:
        engine.in_flight += by
        self._wire.send("leg", engine.id, by)

    def succeeded(self, path: Path) -> None:
        self._wire.send("good", path_out(path))

    def failed(self, failure: EngineFailure, path: Path) -> None:
        self._wire.send("bad", path_out(path), error_out(failure))

    def mark_down(self, engine: Engine, reason: str) -> None:
        self._wire.send("down", engine.id, engine.lives, reason)


class RemoteMeter:
    """Counts at the owner."""

    listens = True

    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    def count(self, what: Counted, *labels: str, by: float = 1.0) -> None:
        self._wire.send("count", what, labels, by)

    def time(self, what: Timed, seconds: float, *labels: str) -> None:
        self._wire.send("time", what, seconds, labels)

    def serving(self, requests: int) -> None:
        self._wire.send("serving", requests)

    def arrived(self) -> None:
        self._wire.send("arrived")

    def served(self, request: Served) -> None:
        self._wire.send("served", path_out(request.path), request.prompt_tokens, request.output_tokens)
