"""Workers without vLLM: the real control server, loader and NIXL transport over arrays of numbers."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence

from hexgen2.vllm_plugin.kv_connector.control_server import ControlServer, Identity
from hexgen2.vllm_plugin.kv_connector.leases import EndedLease, LeaseBook
from hexgen2.vllm_plugin.kv_connector.loader import Loader, LoadOrder
from hexgen2.vllm_plugin.kv_connector.params import VERSION, Offer, WorkerAddress
from hexgen2.vllm_plugin.kv_connector.peers import Peers
from hexgen2.vllm_plugin.kv_connector.streams import StreamBook
from hexgen2.vllm_plugin.kv_connector.transport import NixlTransport, ReadReport
from tests.waiting import HUNG_S

from .layouts import Memory

MODEL = "test-model"


class Worker:
    """One worker of an engine; `start` it in the loop that is to run it."""

    def __init__(
        self, memory: Memory, model: str = MODEL, timeout_s: float = HUNG_S, engine: str = "engine"
    ) -> None:
        self.memory = memory
        self.incarnation = uuid.uuid4().hex
        self.ended: list[EndedLease] = []
        self.book = LeaseBook()
        self.transport = NixlTransport(self.incarnation, ("UCX",), "DRAM")
        self.transport.register([(array.ctypes.data, array.nbytes, 0) for array in memory.arrays.values()])
        identity = Identity(engine, self.incarnation, model, memory.table)
        self.streams = StreamBook([shard.layer for shard in memory.table.layers], self.book)
        self.server = ControlServer(identity, self.book, self.streams, self.transport, self.ended.extend)
        self.peers = Peers(model, self.transport, self.incarnation, HUNG_S)
        self.loader = Loader(memory.table, self.transport, self.peers, self.incarnation, timeout_s, 1)
        self.address = WorkerAddress("127.0.0.1", 1, self.incarnation)

    async def start(self) -> Worker:
        port = await self.server.start("127.0.0.1", 0)
        self.address = WorkerAddress("127.0.0.1", port, self.incarnation)
        return self

    async def close(self) -> None:
        await self.peers.close()
        await self.server.close()
        self.transport.close()

    async def load(self, order: LoadOrder) -> list[ReadReport]:
        return [report for _, report in await self.loader.load(order, asyncio.Event())]


def make_offer(
    workers: Sequence[WorkerAddress], blocks: Sequence[int], tokens: int, block_tokens: int, lease: int = 1
) -> Offer:
    return Offer(VERSION, "prefill", lease, 30.0, tokens, block_tokens, tuple(blocks), tuple(workers))
