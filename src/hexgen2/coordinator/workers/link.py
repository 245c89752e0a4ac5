"""The owner's side of one worker: what it asks is done here, and undone when it is gone."""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

from hexgen2.coordinator.desk import Held, LocalDesk, Meter
from hexgen2.coordinator.engine import Engine
from hexgen2.coordinator.errors import ApiError, EngineFailure
from hexgen2.coordinator.traffic import Served
from hexgen2.coordinator.workers.wire import Message, Wire, error_out, path_in, path_out, want_in


class Counted(Protocol):
    """A counter of this worker's requests."""

    def inc(self) -> None: ...


class Link:
    """`serving` is how many requests the worker serves. `ready` is set once it accepts clients."""

    def __init__(self, desk: LocalDesk, meter: Meter, arrived: Counted, changed: Callable[[], None]) -> None:
        self._desk = desk
        self._arrived = arrived
        self._meter = meter
        self._changed = changed
        self._holds: dict[int, asyncio.Task[None]] = {}
        self._released: dict[int, asyncio.Future[None]] = {}  # of the holds that were granted
        self._places: dict[int, Held] = {}
        # Where its legs began, by name: another engine may have that one's name by a leg's end.
        self._legs: dict[str, deque[Engine]] = defaultdict(deque)
        self.wire = Wire(self._take, self._gone)
        self.ready = asyncio.Event()
        self.serving = 0
        self.unanswered = 0  # pings in a row

    @property
    def holds(self) -> int:
        """Places and slots that the worker has or waits for."""
        return len(self._holds)

    def ping(self) -> None:
        self.unanswered += 1
        self.wire.send("ping")

    def _gone(self) -> None:
        for task in self._holds.values():
            task.cancel()
        for group, engines in self._legs.items():
            for _ in range(len(engines)):
                self._on_leg(group, -1)
        self.serving = 0
        self._changed()

    def _take(self, message: Message) -> None:
        kind, *rest = message
        getattr(self, f"_on_{kind}")(*rest)

    # Places and slots

    def _on_enter(self, id_: int, key: str, want: list[Any]) -> None:
        self._begin(id_, self._desk.admitted(key, want_in(want)))

    def _on_turn(self, id_: int, place: int, priority: int) -> None:
        try:
            self._begin(id_, self._desk.turn(self._places[place], priority))
        except EngineFailure as gone:
            self.wire.send("failed", id_, error_out(gone))

    def _begin(self, id_: int, scope: AbstractAsyncContextManager[Held | None]) -> None:
        task = self._holds[id_] = asyncio.create_task(self._hold(id_, scope), name="worker-hold")
        task.add_done_callback(lambda _: self._forget(id_))  # one that is cancelled at once never runs

    def _forget(self, id_: int) -> None:
        for held in (self._holds, self._released, self._places):
            held.pop(id_, None)

    async def _hold(self, id_: int, scope: AbstractAsyncContextManager[Held | None]) -> None:
        try:
            async with scope as place:
                released = self._released[id_] = asyncio.get_running_loop().create_future()
                if place is not None:
                    self._places[id_] = place
                self.wire.send("granted", id_, None if place is None else path_out(place.path))
                await released
        except (ApiError, EngineFailure) as error:
            self.wire.send("failed", id_, error_out(error))

    def _on_leave(self, id_: int) -> None:
        if id_ in self._released:
            if not self._released[id_].done():
                self._released[id_].set_result(None)
        elif id_ in self._holds:
            self._holds[id_].cancel()

    def _on_fetched(self, id_: int) -> None:
        if id_ in self._places:
            self._places[id_].fetched()

    def _on_knock(self, id_: int, key: str) -> None:
        try:
            self._desk.refuse_early(key)
        except ApiError as error:
            self.wire.send("failed", id_, error_out(error))
        else:
            self.wire.send("granted", id_, None)

    def _on_elsewhere(self, id_: int, place: int, want: list[Any], avoid: list[list[Any]]) -> None:
        held = self._places[place]
        moved = self._desk.move(held, want_in(want), [path_in(path) for path in avoid])
        self.wire.send("granted", id_, path_out(held.path) if moved else None)

    # What became of them

    def _on_leg(self, group: str, by: int) -> None:
        begun = self._legs[group]
        if by > 0:
            if (engine := self._desk.engines.get(group)) is not None:
                begun.append(engine)
                self._desk.leg(engine, 1)
        elif begun:
            self._desk.leg(begun.popleft(), -1)

    def _on_good(self, path: list[Any]) -> None:
        self._desk.succeeded(path_in(path))

    def _on_bad(self, path: list[Any], error: list[Any]) -> None:
        self._desk.failed(EngineFailure(*error[1:]), path_in(path))

    def _on_down(self, group: str, lives: int, reason: str) -> None:
        engine = self._desk.engines.get(group)
        if engine is not None and engine.lives == lives:  # else it is another one by now
            self._desk.mark_down(engine, reason)

    def _on_heard(self, at: Mapping[str, float]) -> None:
        for group, when in at.items():
            engine = self._desk.engines.get(group)
            if engine is not None:
                engine.heard_at = max(engine.heard_at, when)

    # What it counts

    def _on_count(self, what: Any, labels: list[str], by: float) -> None:
        self._meter.count(what, *labels, by=by)

    def _on_time(self, what: Any, seconds: float, labels: list[str]) -> None:
        self._meter.time(what, seconds, *labels)

    def _on_serving(self, requests: int) -> None:
        self.serving = requests
        self._changed()

    def _on_arrived(self) -> None:
        self._arrived.inc()
        self._meter.arrived()

    def _on_served(self, path: list[Any], prompt_tokens: int, output_tokens: int) -> None:
        self._meter.served(Served(path_in(path), prompt_tokens, output_tokens))

    # How it is

    def _on_ready(self) -> None:
        self.ready.set()

    def _on_pong(self) -> None:
        self.unanswered = 0


def table(engines: Mapping[str, Engine], by_class: bool) -> Message:
    """The engines as a worker needs to know them."""
    rows = [
        [e.endpoint.model_dump(), e.up, e.reason, e.lives, e.max_model_len, e.returning]
        for e in engines.values()
    ]
    return ["engines", rows, by_class]
