"""The worker's half of the connector: its transfer thread, and the desk where vLLM leaves orders and takes
results.

Everything that waits (peers, reads, leases) happens on one thread with an event loop; vLLM's own thread only
drops orders and picks up what has ended. NIXL is used from that one thread alone.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import uuid
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field

from hexgen2.vllm_plugin.kv_connector.control_server import ControlServer, Identity
from hexgen2.vllm_plugin.kv_connector.leases import EndedLease, LeaseBook, LeaseOrder
from hexgen2.vllm_plugin.kv_connector.loader import LoadAborted, Loader, LoadError, LoadOrder
from hexgen2.vllm_plugin.kv_connector.loop_thread import LoopThread
from hexgen2.vllm_plugin.kv_connector.observations import (
    EXPIRED,
    FAILED,
    TRANSFERS,
    Observations,
    is_empty,
    no_observations,
)
from hexgen2.vllm_plugin.kv_connector.params import WorkerAddress
from hexgen2.vllm_plugin.kv_connector.peers import Peers
from hexgen2.vllm_plugin.kv_connector.pump import sleep_to_the_microsecond
from hexgen2.vllm_plugin.kv_connector.settings import Settings
from hexgen2.vllm_plugin.kv_connector.shards import WorkerTable
from hexgen2.vllm_plugin.kv_connector.streams import Ready, StreamBook, StreamEnd, StreamStep
from hexgen2.vllm_plugin.kv_connector.transport import NixlTransport

logger = logging.getLogger("vllm.hexgen2.kv")

START_S = 120.0
"""Registering a large cache with a network card takes its time."""


@dataclass
class Ended:
    """Requests whose blocks are free to be given back (`sent`), whose loads are over (`received`), and those
    that failed.
    """

    sent: set[str] = field(default_factory=set)
    received: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)


class WorkerSide:
    """One worker's transfers. Public methods are called from vLLM's thread."""

    def __init__(
        self,
        engine: str,
        model: str,
        host: str,
        settings: Settings,
        on_thread_start: Callable[[], None] | None = None,
        fence: Callable[[], Ready] | None = None,
    ) -> None:
        self.incarnation = uuid.uuid4().hex
        self._engine = engine
        self._model = model
        self._host = host
        self._settings = settings
        self._on_thread_start = on_thread_start
        self._fence = fence
        self._streams: StreamBook | None = None
        self._thread: LoopThread | None = None
        self._server: ControlServer | None = None
        self._loader: Loader | None = None
        self._transport: NixlTransport | None = None
        self._port = 0
        self._aborts: dict[str, asyncio.Event] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._lock = threading.Lock()  # guards the two below
        self._ended = Ended()
        self._observed = no_observations()

    def start(self, table: WorkerTable, memory: Sequence[tuple[int, int, int]]) -> None:
        """Register the KV cache and listen. Raises RuntimeError if NIXL or the port is not to be had, or that
        takes too long."""
        self._thread = LoopThread("hexgen2-kv-transfer", self._on_thread_start)
        try:
            self._thread.run(self._start(table, memory), START_S)
        except TimeoutError as error:  # an OSError too
            raise RuntimeError(
                f"KV connector: the KV cache could not be registered with NIXL within {START_S:g} s"
            ) from error
        except OSError as error:
            raise RuntimeError(
                f"KV connector: cannot listen on {self._host}:{self._wanted_port(table)}"
                f" ({error.strerror or error}); set `host` and `port` in kv_connector_extra_config"
            ) from error
        logger.info(
            "KV connector: worker %d listens on %s:%d (%s, %d layers)",
            table.rank, self._host, self._port, table.page_format, len(table.layers),
        )  # fmt: skip

    def _wanted_port(self, table: WorkerTable) -> int:
        return self._settings.port + table.rank if self._settings.port else 0

    async def _start(self, table: WorkerTable, memory: Sequence[tuple[int, int, int]]) -> None:
        sleep_to_the_microsecond()
        transport = self._transport = NixlTransport(self.incarnation, self._settings.backends, table.memory)
        transport.register(memory)
        identity = Identity(self._engine, self.incarnation, self._model, table)
        book = LeaseBook()
        self._streams = StreamBook([shard.layer for shard in table.layers], book, self._fence)
        self._server = ControlServer(identity, book, self._streams, transport, self._leases_ended)
        self._port = await self._server.start(self._host, self._wanted_port(table))
        peers = Peers(self._model, transport, self.incarnation, self._settings.connect_timeout_seconds)
        self._loader = Loader(
            table,
            transport,
            peers,
            self.incarnation,
            self._settings.transfer_timeout_seconds,
            self._settings.overlap_read_bytes,
        )

    @property
    def address(self) -> WorkerAddress:
        return WorkerAddress(self._host, self._port, self.incarnation)

    def take(self, leases: Sequence[LeaseOrder], loads: Sequence[LoadOrder]) -> None:
        """Begin what the scheduler ordered for this step."""
        if self._thread is not None and (leases or loads):
            self._thread.call(self._begin, tuple(leases), tuple(loads))

    def begin_step(self, steps: Sequence[StreamStep], ends: Sequence[StreamEnd]) -> None:
        """Before the forward pass: what it adds to which stream, and which streams are over. In force when this
        returns, since the pass may overwrite the blocks of a stream that is over.
        """
        if self._streams is not None:
            self._streams.begin_step(steps, ends)

    def layer_done(self, layer: str) -> None:
        if self._streams is not None:
            self._streams.layer_done(layer)

    def end_step(self) -> None:
        if self._streams is not None:
            self._streams.end_step()

    def abort(self, requests: set[str]) -> None:
        """These requests have finished; those of their loads that do not read yet need not begin."""
        known = [request for request in requests if request in self._aborts]
        if self._thread is not None and known:
            self._thread.call(self._abort, known)

    def take_ended(self) -> Ended:
        with self._lock:
            ended, self._ended = self._ended, Ended()
        return ended

    def take_observations(self) -> Observations | None:
        """What was observed since the last call, if anything."""
        with self._lock:
            if is_empty(self._observed):
                return None
            observed, self._observed = self._observed, no_observations()
            return observed

    def close(self) -> None:
        if self._thread is None:
            return
        try:
            self._thread.run(self._close(), 5.0)
        except TimeoutError:
            logger.warning("KV connector: the transfer thread did not end in time")
        self._thread.stop()
        self._thread = None

    async def _close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._server is not None:
            await self._server.close()
        if self._loader is not None:
            await self._loader.peers.close()
        if self._transport is not None:
            self._transport.close()

    # On the transfer thread from here on.

    def _begin(self, leases: Sequence[LeaseOrder], loads: Sequence[LoadOrder]) -> None:
        for lease in leases:
            self._spawn(self._order(lease))
        for load in loads:
            self._aborts[load.request] = asyncio.Event()
            self._spawn(self._load(load))

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _abort(self, requests: list[str]) -> None:
        for request in requests:
            if event := self._aborts.get(request):
                event.set()

    async def _order(self, lease: LeaseOrder) -> None:
        assert self._server is not None
        await self._server.order(lease.lease, lease.request, lease.duration_s, lease.stream)

    async def _load(self, order: LoadOrder) -> None:
        """Run a load; whatever happens, its end is reported, or vLLM would keep the blocks for ever."""
        assert self._loader is not None
        failed, reports = True, []
        try:
            reports = await self._loader.load(order, self._aborts[order.request])
            failed = False
        except LoadAborted:
            logger.debug("KV load of %s: aborted before its end", order.request)
        except LoadError as error:
            logger.warning("KV load of %s from %s failed: %s", order.request, order.offer.engine, error)
        except Exception:
            logger.exception("KV load of %s from %s failed", order.request, order.offer.engine)
        finally:
            aborted = self._aborts.pop(order.request).is_set()
            with self._lock:
                self._ended.received.add(order.request)
                if failed:
                    self._ended.failed.add(order.request)
                    if not aborted:
                        self._observed[FAILED].append(order.offer.engine)
                for engine, report in reports:
                    self._observed[TRANSFERS].append(
                        [engine, report.seconds, report.post_s, report.bytes, report.descriptors]
                    )

    def _leases_ended(self, ended: list[EndedLease]) -> None:
        with self._lock:
            for lease in ended:
                self._ended.sent.add(lease.request)
                if lease.expired:
                    self._observed[EXPIRED] += 1
        for lease in ended:
            if lease.expired:
                logger.warning("KV of %s: nobody fetched it in time; its blocks are free again", lease.request)
