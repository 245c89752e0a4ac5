"""One load: fetch a request's KV from every worker of the prefill engine that holds a part of it.

Announce, read, check: the lease must be held before the read (else nothing is read) and still after it (else
what was read may be another request's KV, and the load counts as failed). A load has two ends only: it
succeeded, or it failed with a reason; either way nothing can write into its blocks any more when it returns.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from hexgen2.vllm_plugin.kv_connector.follower import Follower
from hexgen2.vllm_plugin.kv_connector.leases import LeaseState
from hexgen2.vllm_plugin.kv_connector.params import Offer, Stream
from hexgen2.vllm_plugin.kv_connector.peers import Peer, PeerError, Peers
from hexgen2.vllm_plugin.kv_connector.regions import (
    Regions,
    TokenChunks,
    concatenate,
    kernel_blocks,
    layer_regions,
    token_chunks,
)
from hexgen2.vllm_plugin.kv_connector.shards import LayerShard, WorkerTable
from hexgen2.vllm_plugin.kv_connector.streams import Progress
from hexgen2.vllm_plugin.kv_connector.transfer_plan import PlanError, plan_pieces
from hexgen2.vllm_plugin.kv_connector.transport import NixlTransport, ReadReport, TransferError
from hexgen2.vllm_plugin.kv_connector.wire import Announce, Finish, Follow

ANSWER_S = 15.0
"""Longest wait for one control answer; announcing may wait for the prefill engine's current step."""
FOLLOW_S = 0.5
"""Longest wait for one word about a prefill's progress; after it a load looks whether it should stop."""


class LoadError(Exception):
    """The load failed; `peer` is the engine that it failed with."""

    def __init__(self, peer: str, reason: str) -> None:
        self.peer = peer
        super().__init__(reason)


class LoadAborted(Exception):
    """The request was aborted before all was read for it; nothing is being read any more."""


@dataclass
class LoadOrder:
    """The scheduler's order to a worker: fetch tokens `start` to `stop` of a request into `blocks`.

    `blocks` are the scheduler's blocks of the request from token 0 on, `block_tokens` tokens each. `lost` says
    why the load is known to fail, if it is.
    """

    request: str
    offer: Offer | Stream
    start: int
    stop: int
    blocks: tuple[int, ...]
    block_tokens: int
    lost: str = ""


@dataclass(frozen=True)
class _Part:
    here: LayerShard
    there: LayerShard
    first_head: int
    end_head: int


@dataclass
class Loader:
    """Loads into one worker's KV cache, whose table is `table`."""

    table: WorkerTable
    transport: NixlTransport
    peers: Peers
    reader: str
    timeout_s: float
    smallest_read: int
    """Bytes that a read of a stream waits for, unless they are the last."""
    _plans: dict[tuple[str, ...], dict[int, list[_Part]]] = field(default_factory=dict)

    async def load(self, order: LoadOrder, aborted: asyncio.Event) -> list[tuple[str, ReadReport]]:
        """Run the load; what was read from which engine. Raises LoadError or LoadAborted."""
        engine = order.offer.engine
        if order.lost:
            raise LoadError(engine, order.lost)
        deadline = time.monotonic() + self.timeout_s
        try:
            peers = await asyncio.gather(*(self.peers.get(address) for address in order.offer.workers))
            plan = self._plan(peers)
        except (PeerError, PlanError) as error:
            raise LoadError(engine, str(error)) from error
        if aborted.is_set():
            raise LoadAborted
        stop = _Stop(aborted)
        # All parts are seen through to their end, since none may write once this returns.
        results = await asyncio.gather(
            *(self._read_from(peers[number], parts, order, deadline, stop) for number, parts in plan.items()),
            return_exceptions=True,
        )
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, LoadAborted):
                if isinstance(result, PeerError | PlanError | TransferError):
                    raise LoadError(engine, str(result)) from result
                raise result
        if any(isinstance(result, LoadAborted) for result in results):
            raise LoadAborted
        return [(engine, result) for result in results if isinstance(result, ReadReport)]

    async def _read_from(
        self, peer: Peer, parts: Sequence[_Part], order: LoadOrder, deadline: float, stop: _Stop
    ) -> ReadReport:
        async with self.peers.reading(peer):
            try:
                if isinstance(order.offer, Stream):
                    return await self._follow(peer, parts, order, order.offer, stop)
                return await self._read(peer, parts, order, order.offer, deadline)
            except BaseException:
                stop.failed = True
                raise

    async def _follow(
        self, peer: Peer, parts: Sequence[_Part], order: LoadOrder, stream: Stream, stop: _Stop
    ) -> ReadReport:
        """Read a stream to its end, as it comes."""
        key, name, wait = stream.key, f"{self.reader}/{order.request}", min(ANSWER_S, self.timeout_s)
        numbers = {shard.layer: number for number, shard in enumerate(peer.table.layers)}
        follower = Follower(
            order.start,
            order.stop,
            [numbers[part.there.layer] for part in parts],
            [math.gcd(part.here.block_tokens, part.there.block_tokens) for part in parts],
        )
        held = len(peer.table.layers)
        # Of what one layer of the sender holds of one token, on average.
        unit = sum((part.end_head - part.first_head) * part.there.state_bytes for part in parts) / held
        batch, come, total = math.ceil(self.smallest_read / unit), -held, ReadReport(0, 0, 0.0, 0.0)
        deadline = time.monotonic() + self.timeout_s
        while not follower.complete:
            hold_s = self.timeout_s + wait
            news = await peer.connection.follow(
                Follow(key, name, hold_s, come + batch, order.stop, len(follower.blocks), FOLLOW_S),
                FOLLOW_S + wait,
            )
            if news.state == LeaseState.ENDED:
                raise PeerError(f"{news.reason}; what was read is of no use")
            if stop.now:
                await peer.connection.ask(Finish(key, name), wait)
                raise LoadAborted
            now = Progress(news.done, news.layers, news.ahead).amount(held)
            if now > come:
                deadline = time.monotonic() + self.timeout_s  # a long prefill may take its time, if it goes on
            elif time.monotonic() > deadline:
                await peer.connection.ask(Finish(key, name), wait)
                raise PeerError(f"the prefill has not come further for {self.timeout_s:g} s")
            come = now
            try:
                regions = [
                    _regions(
                        [parts[number] for number in span.parts],
                        order,
                        span.start,
                        span.stop,
                        follower.blocks,
                        stream.block_tokens,
                    )
                    for span in follower.spans(news)
                ]
            except PlanError:
                await peer.connection.ask(Finish(key, name), wait)
                raise
            if regions:
                total += await self._transfer(peer, concatenate(regions), deadline)
        await self._finish(peer, key, name, wait)
        return total

    async def _read(
        self, peer: Peer, parts: Sequence[_Part], order: LoadOrder, offer: Offer, deadline: float
    ) -> ReadReport:
        """Read what a lease holds."""
        regions = _regions(parts, order, order.start, order.stop, offer.blocks, offer.block_tokens)
        lease, name = offer.lease, f"{self.reader}/{order.request}"
        wait = min(ANSWER_S, self.timeout_s)
        await self._announce(peer, lease, name, deadline, wait)
        report = await self._transfer(peer, regions, deadline)
        await self._finish(peer, lease, name, wait)
        return report

    async def _announce(self, peer: Peer, lease: int | str, name: str, deadline: float, wait: float) -> None:
        hold_s = max(0.0, deadline - time.monotonic()) + wait
        before = await peer.connection.ask(Announce(lease, name, hold_s), wait)
        if not before.held:
            raise PeerError(f"{before.reason}: nothing was read")

    async def _finish(self, peer: Peer, lease: int | str, name: str, wait: float) -> None:
        after = await peer.connection.ask(Finish(lease, name), wait)
        if not after.held:
            raise PeerError(f"{after.reason}, it was lost during the read")

    async def _transfer(self, peer: Peer, regions: Regions, deadline: float) -> ReadReport:
        def give_up() -> str:
            if peer.connection.closed:
                return peer.connection.closed
            return f"no end after {self.timeout_s:g} s" if time.monotonic() > deadline else ""

        try:
            return await self.transport.read(
                peer.address.incarnation,
                regions,
                peer.table.memory,
                self.table.device,
                peer.table.device,
                give_up,
            )
        except TransferError:
            await self.peers.drop(peer)  # a fresh start for whoever comes next; it also ends the hold
            raise

    def _plan(self, peers: Sequence[Peer]) -> dict[int, list[_Part]]:
        """What to read from each of `peers`; the same for every request, so it is kept."""
        key = tuple(peer.address.incarnation for peer in peers)
        if key not in self._plans:
            if len(self._plans) >= 64:
                self._plans.clear()  # engines come and go; plans are quickly made again
            mine = {shard.layer: shard for shard in self.table.layers}
            theirs = [{shard.layer: shard for shard in peer.table.layers} for peer in peers]
            plan: dict[int, list[_Part]] = {}
            for piece in plan_pieces(self.table, [peer.table for peer in peers]):
                part = _Part(
                    mine[piece.layer], theirs[piece.sender][piece.layer], piece.first_head, piece.end_head
                )
                plan.setdefault(piece.sender, []).append(part)
            self._plans[key] = plan
        return self._plans[key]


@dataclass
class _Stop:
    """Whether a load that can stop should: its request was aborted, or another part of it failed."""

    aborted: asyncio.Event
    failed: bool = False

    @property
    def now(self) -> bool:
        return self.failed or self.aborted.is_set()


def _regions(
    parts: Sequence[_Part],
    order: LoadOrder,
    start: int,
    stop: int,
    remote_blocks: Sequence[int],
    remote_block_tokens: int,
) -> Regions:
    """The runs of bytes of tokens `start` to `stop` of some parts."""
    chunks: dict[tuple[int, int], TokenChunks] = {}  # layers mostly have one block size
    for part in parts:
        here, there = part.here.block_tokens, part.there.block_tokens
        if (here, there) in chunks:
            continue
        if order.block_tokens % here or remote_block_tokens % there:
            raise PlanError(f"{part.here.layer}: a block is no whole number of kernel blocks")
        chunks[here, there] = token_chunks(
            start,
            stop,
            kernel_blocks(order.blocks, order.block_tokens // here),
            here,
            kernel_blocks(remote_blocks, remote_block_tokens // there),
            there,
        )
    shapes: dict[tuple[object, ...], tuple[_Part, Regions]] = {}  # and mostly one shape
    regions = []
    for part in parts:
        shape = (part.first_head, part.end_head, _shape(part.here), _shape(part.there))
        if shape not in shapes:
            pair = chunks[part.here.block_tokens, part.there.block_tokens]
            shapes[shape] = (
                part,
                layer_regions(part.here, part.there, part.first_head, part.end_head, pair),
            )
        first, runs = shapes[shape]
        local = part.here.address - first.here.address
        regions.append(runs.moved(local, part.there.address - first.there.address))
    return concatenate(regions)


def _shape(shard: LayerShard) -> tuple[object, ...]:
    """All that matters to where a shard's bytes lie, but for its address."""
    return (
        shard.first_head,
        shard.heads,
        shard.blocks,
        shard.block_tokens,
        shard.block_stride,
        shard.head_stride,
        shard.token_stride,
        shard.state_bytes,
        shard.element_bytes,
        shard.slab,
    )
