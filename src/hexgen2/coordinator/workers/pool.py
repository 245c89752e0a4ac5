"""The workers as processes: started, watched, started again, ended."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import random
import socket
import sys
from collections.abc import Sequence

from hexgen2.coordinator.desk import LocalDesk
from hexgen2.coordinator.engine import Engine
from hexgen2.coordinator.errors import WorkersFailed
from hexgen2.coordinator.fleet import Fleet
from hexgen2.coordinator.metrics import Metrics
from hexgen2.coordinator.watches import going_on
from hexgen2.coordinator.workers.link import Link, table
from hexgen2.coordinator.workers.settings import WorkerSettings
from hexgen2.coordinator.workers.wire import Message

log = logging.getLogger(__name__)

START_S = 120.0
_PING_S = 1.0
# Of a worker that has not answered as many pings in a row: it hangs.
_UNANSWERED = 15
# One that did not live so long is started again only after a pause, which doubles up to the second number.
_LASTING_S, _MAX_PAUSE_S = 5.0, 10.0


def listening(host: str, port: int, number: int) -> list[list[socket.socket]]:
    """For each worker the sockets at which it accepts, one per address that `host` stands for; the port is
    chosen where it is 0. OSError where it is taken.

    With a socket of its own each (SO_REUSEPORT) the kernel spreads connections over the workers. The owner
    keeps them all: those that arrive while a worker is being started again wait for it.
    """
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    addresses = list(dict.fromkeys((family, address) for family, _, _, _, address in found))
    made: list[list[socket.socket]] = [[] for _ in range(number)]
    with contextlib.ExitStack() as stack:
        for family, address in addresses:
            # Another program's socket must not become one of ours by sharing its port.
            with socket.socket(family) as alone:
                alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                _only_v6(alone, family)
                alone.bind((address[0], port, *address[2:]))
                alone.listen(1)
                port = alone.getsockname()[1]
            for place in range(number):
                one = stack.enter_context(socket.socket(family))
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                _only_v6(one, family)
                one.bind((address[0], port, *address[2:]))
                one.listen(2048)
                made[place].append(one)
        if not addresses:
            raise OSError(errno.EADDRNOTAVAIL, "no such address")
        stack.pop_all()
    return made


def _only_v6(one: socket.socket, family: int) -> None:
    if family == socket.AF_INET6:
        one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)


class Workers:
    """So many workers, whatever happens to any of them."""

    def __init__(
        self,
        settings: WorkerSettings,
        sockets: Sequence[list[socket.socket]],
        fleet: Fleet,
        desk: LocalDesk,
        metrics: Metrics,
    ) -> None:
        self._settings = settings.for_one_of(len(sockets)).model_dump_json()
        self._sockets = sockets
        self._fleet = fleet
        self._desk = desk
        self._metrics = metrics
        self._links: dict[int, Link] = {}
        self._processes: dict[int, asyncio.subprocess.Process] = {}
        self._keepers: list[asyncio.Task[None]] = []
        self._table: Message = []
        self._watch: asyncio.Task[None] | None = None
        self._ending = False
        self._first_failure: Exception | None = None  # of one that never came up
        # Workers name prompts by hashes, which must be the same in all of them and nobody else's to guess.
        self._seed = random.SystemRandom().randrange(1, 2**32)

    @property
    def pids(self) -> list[int]:
        """Of those that run."""
        return [process.pid for process in self._processes.values()]

    @property
    def links(self) -> list[Link]:
        """To those that run."""
        return list(self._links.values())

    async def start(self) -> None:
        """Returns when all accept clients. OSError where no process or descriptor is to be had for one,
        WorkersFailed where one ends or does not come up in time."""
        self._keepers = [
            asyncio.create_task(self._keep(place), name=f"worker-{place}")
            for place in range(len(self._sockets))
        ]
        self._fleet.watchers.append(self)
        self._watch = asyncio.create_task(self._look(), name="workers-watch")
        try:
            async with asyncio.timeout(START_S):
                while not self._all_ready():
                    if self._first_failure is not None:
                        raise self._first_failure
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise WorkersFailed(f"worker processes did not come up within {START_S:g} s") from None

    def _all_ready(self) -> bool:
        return len(self._links) == len(self._sockets) and all(
            link.ready.is_set() for link in self._links.values()
        )

    async def _keep(self, place: int) -> None:
        """Keep one worker running. Returns when all are to end, or when it never came up at all."""
        clock, pause_s, came_up = asyncio.get_running_loop().time, 0.25, False
        while not self._ending:
            began = clock()
            try:
                code, ready = await self._run(place)
            except OSError as error:  # no process or descriptor is to be had now
                failure: Exception = error
                if came_up:
                    log.error("worker %d cannot be started: %s", place, error)
            else:
                came_up = came_up or ready
                failure = WorkersFailed(f"worker {place} ended ({code}) while it started; its log is above")
                if came_up and not self._ending:
                    self._metrics.worker_restarts.inc()
                    log.warning("worker %d ended (%d) and is started again", place, code)
            if not came_up:
                self._first_failure = self._first_failure or failure
            if self._ending or not came_up:
                return
            pause_s = 0.0 if clock() - began > _LASTING_S else min(max(0.25, 2 * pause_s), _MAX_PAUSE_S)
            await asyncio.sleep(pause_s)

    async def _run(self, place: int) -> tuple[int, bool]:
        """One worker from its start to its end: its exit code, and whether it came to serve."""
        ours, theirs = socket.socketpair()
        arrived = self._metrics.worker_requests.labels(str(place))
        link = Link(self._desk, self._metrics, arrived, self._count)
        numbers = [theirs.fileno(), *(one.fileno() for one in self._sockets[place])]
        command = (sys.executable, "-m", "hexgen2.coordinator.workers", *map(str, numbers))
        env = os.environ | {"PYTHONHASHSEED": str(self._seed)}
        with contextlib.ExitStack() as unless_started, theirs:
            unless_started.enter_context(ours)
            process = await asyncio.create_subprocess_exec(
                *command, pass_fds=numbers, env=env, stdin=asyncio.subprocess.DEVNULL
            )
            unless_started.pop_all()
        try:
            await link.wire.open(ours)
            self._processes[place], self._links[place] = process, link
            link.wire.send("settings", self._settings)
            link.wire.send(*table(self._fleet.engines, self._fleet.by_class))
            if self._ending:
                link.wire.send("drain")
            code = await process.wait()
            return code, link.ready.is_set()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
            self._processes.pop(place, None)
            self._links.pop(place, None)
            link.wire.close()
            self._count()

    def _count(self) -> None:
        self._metrics.serving(sum(link.serving for link in self._links.values()))
        self._metrics.workers.set(sum(link.ready.is_set() for link in self._links.values()))

    # What the workers must know

    def engine_down(self, engine: Engine, reason: str, silent: bool) -> None:
        self._send("down", engine.id, reason, silent)

    def fleet_changed(self) -> None:
        now = table(self._fleet.engines, self._fleet.by_class)
        if now != self._table:
            self._table = now
            self._send(*now)

    def reload(self) -> None:
        """Read keys and certificates again now."""
        self._send("reload")

    def _send(self, *message: object) -> None:
        for link in self._links.values():
            link.wire.send(*message)

    async def _look(self) -> None:
        """Ask the workers whether they live, and kill those that do not say so."""
        while True:
            await asyncio.sleep(_PING_S)
            with going_on("watch over workers"):
                self._look_once()

    def _look_once(self) -> None:
        self.fleet_changed()
        self._count()
        for place, link in list(self._links.items()):
            if link.unanswered >= _UNANSWERED:
                log.warning("worker %d hangs and is killed", place)
                self._processes[place].kill()
            elif link.ready.is_set():
                link.ping()

    # The end

    async def drain(self, within_s: float) -> bool:
        """Accept nobody any more and let what runs finish; whether it did within the time."""
        self._ending = True
        for one in [one for sockets in self._sockets for one in sockets]:
            one.close()
        self._send("drain")
        if not self._keepers:
            return True
        _, left = await asyncio.wait(self._keepers, timeout=within_s)
        return not left

    async def stop(self) -> None:
        """End whatever is left."""
        self._ending = True
        for task in (*self._keepers, *([] if self._watch is None else [self._watch])):
            task.cancel()
            await asyncio.wait((task,))
        for one in [one for sockets in self._sockets for one in sockets]:
            one.close()
        if self in self._fleet.watchers:
            self._fleet.watchers.remove(self)
