"""Transfers over real NIXL between workers without vLLM: unlike layouts, leases, and all that goes wrong."""

from __future__ import annotations

import asyncio
import contextlib
import math
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from importlib.util import find_spec

import pytest

from hexgen2.vllm_plugin.kv_connector.loader import LoadAborted, LoadError, LoadOrder
from hexgen2.vllm_plugin.kv_connector.params import Offer, WorkerAddress
from hexgen2.vllm_plugin.kv_connector.pump import LONGEST_PAUSE_S
from hexgen2.vllm_plugin.kv_connector.shards import Slab
from hexgen2.vllm_plugin.kv_connector.transfer_plan import received_bytes
from tests.waiting import HUNG_S, until

from .layouts import Memory, Stage, build_memories, untouched, write_sequence, wrong_elements
from .workers import Worker, make_offer

needs_nixl = pytest.mark.skipif(find_spec("nixl") is None, reason="NIXL comes with the cpu and cuda extras")
# NIXL crashes in a process with OR-Tools (either order), and where the tests of the asymmetric executor have
# run. Engines load neither.
needs_process = pytest.mark.skipif(
    not {"ortools", "vllm"}.isdisjoint(sys.modules),
    reason="NIXL needs a process of its own here: run tests/vllm_plugin/kv_connector by itself",
)
pytestmark = [needs_nixl, needs_process]

SIZES = {"kv_heads": 4, "channels": 4, "blocks": 12, "block_tokens": 8}
TOKENS, THERE, HERE = 40, (7, 2, 9, 0, 4), (1, 2, 3, 8, 10)
ONE = [Stage(1, 4)]


@contextlib.asynccontextmanager
async def running(memories: Sequence[Memory], **options) -> AsyncIterator[list[Worker]]:
    workers = [await Worker(memory, **options).start() for memory in memories]
    try:
        yield workers
    finally:
        for worker in workers:
            await worker.close()


@contextlib.asynccontextmanager
async def prefilled(layout: list[Stage] = ONE, lease: float | None = 30.0, **sizes) -> AsyncIterator[tuple]:
    """A prefill engine that holds a sequence, and its offer of it (ordered unless `lease` is None)."""
    memories = build_memories(layout, **(SIZES | sizes))
    for memory in memories:
        write_sequence(memory, THERE, TOKENS)
    async with running(memories) as workers:
        if lease is not None:
            for worker in workers:
                await worker.server.order(1, "request", lease)
        block_tokens = memories[0].table.layers[0].block_tokens
        yield workers, make_offer([worker.address for worker in workers], THERE, TOKENS, block_tokens)


def order(offer: Offer, start: int = 0) -> LoadOrder:
    return LoadOrder("request", offer, start, TOKENS, HERE, SIZES["block_tokens"])


def layout(*stages: tuple[int, int]) -> list[Stage]:
    return [Stage(tp, layers) for tp, layers in stages]


@pytest.mark.parametrize(
    ("senders", "receivers"),
    [
        (ONE, ONE),
        (layout((2, 4)), ONE),
        (ONE, layout((2, 4))),
        (layout((2, 3), (1, 1)), layout((1, 1), (2, 3))),
        (layout((1, 1), (1, 3)), ONE),
        (ONE, layout((1, 3), (1, 1))),
        (layout((4, 2), (1, 1), (2, 1)), layout((2, 4))),
        (layout((8, 4)), layout((2, 1), (8, 3))),
    ],
)
async def test_any_layout_reads_from_any_layout(senders: list[Stage], receivers: list[Stage]) -> None:
    async with prefilled(senders) as (workers, offer), running(build_memories(receivers, **SIZES)) as readers:
        reports = await asyncio.gather(*(reader.load(order(offer)) for reader in readers))
        for reader, parts in zip(readers, reports, strict=True):
            assert wrong_elements(reader.memory, HERE, 0, TOKENS) == 0
            assert untouched(reader.memory, HERE)
            assert sum(part.bytes for part in parts) == received_bytes(reader.memory.table, TOKENS)
        assert not any(worker.ended for worker in workers)


@pytest.mark.parametrize("slab", [Slab.ROWS, Slab.TRANSPOSED_KEYS])
async def test_block_sizes_may_differ(slab: Slab) -> None:
    sizes = {"block_tokens": 16, "slab": slab}
    async with (
        prefilled(**sizes) as (_, offer),
        running(build_memories(ONE, **(SIZES | {"slab": slab}))) as readers,
    ):
        await readers[0].load(order(offer))
        assert wrong_elements(readers[0].memory, HERE, 0, TOKENS) == 0


async def test_what_the_prefix_cache_has_is_neither_read_nor_written() -> None:
    async with prefilled() as (_, offer), running(build_memories(ONE, **SIZES)) as (reader,):
        reports = await reader.load(order(offer, start=24))
        assert wrong_elements(reader.memory, HERE, 24, TOKENS) == 0
        assert untouched(reader.memory, HERE[3:])
        assert reports[0].bytes == received_bytes(reader.memory.table, 16)


async def test_a_worker_reads_from_itself() -> None:
    async with prefilled() as ((worker,), offer):
        await worker.load(replace_blocks(order(offer), (1, 3, 5, 6, 8)))
        assert wrong_elements(worker.memory, (1, 3, 5, 6, 8), 0, TOKENS) == 0


def replace_blocks(load: LoadOrder, blocks: tuple[int, ...]) -> LoadOrder:
    return replace(load, blocks=blocks)


async def test_a_release_gives_the_blocks_back_once() -> None:
    async with prefilled() as ((worker,), offer), running(build_memories(ONE, **SIZES)) as (reader,):
        await reader.load(order(offer))
        assert not worker.ended
        peer = await reader.peers.get(offer.workers[0])
        from hexgen2.vllm_plugin.kv_connector.wire import Release

        assert (await peer.connection.ask(Release(1), HUNG_S)).held
        assert not (await peer.connection.ask(Release(1), HUNG_S)).held
        assert [(ended.request, ended.expired) for ended in worker.ended] == [("request", False)]


async def test_an_expired_lease_is_an_error_before_anything_is_read() -> None:
    async with prefilled(lease=0.01) as ((worker,), offer), running(build_memories(ONE, **SIZES)) as (reader,):
        await until(lambda: [ended.expired for ended in worker.ended] == [True])
        with pytest.raises(LoadError, match="lease is ended: nothing was read"):
            await reader.load(order(offer))
        assert untouched(reader.memory, ())
        await until(lambda: worker.transport.pump.pause_s == math.inf)  # nobody reads, so nobody is helped


async def test_a_lease_that_ends_during_the_read_is_an_error_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks are given away and overwritten while the read is under way: what arrived must not be used."""
    async with prefilled() as ((worker,), offer), running(build_memories(ONE, **SIZES)) as (reader,):
        read = reader.transport.read

        async def slow_read(*arguments):
            worker.book._leases[1].holds.clear()  # as after LONGEST_HOLD_S
            worker.book._leases[1].expires = 0.0
            await until(lambda: bool(worker.ended))  # the blocks have been given back
            for array in worker.memory.arrays.values():
                array[:] = -1
            return await read(*arguments)

        monkeypatch.setattr(reader.transport, "read", slow_read)
        with pytest.raises(LoadError, match="lost during the read"):
            await reader.load(order(offer))


async def test_a_reader_holds_the_lease_open_while_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    async with prefilled() as ((worker,), offer), running(build_memories(ONE, **SIZES)) as (reader,):
        read = reader.transport.read

        async def slow_read(*arguments):
            worker.book._leases[1].expires = 0.0
            await asyncio.sleep(0.3)  # some looks for leases that are over
            assert not worker.ended
            return await read(*arguments)

        monkeypatch.setattr(reader.transport, "read", slow_read)
        await reader.load(order(offer))
        assert wrong_elements(reader.memory, HERE, 0, TOKENS) == 0
        await until(lambda: [ended.expired for ended in worker.ended] == [True])


async def test_the_network_is_looked_at_while_somebody_reads_and_not_after(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with prefilled() as ((worker,), offer), running(build_memories(ONE, **SIZES)) as (reader,):
        read = reader.transport.read

        async def slow_read(*arguments):
            await until(lambda: worker.transport.pump.pause_s == LONGEST_PAUSE_S)  # calm: nothing comes yet
            return await read(*arguments)

        monkeypatch.setattr(reader.transport, "read", slow_read)
        await reader.load(order(offer))
        for side in (worker, reader):
            await until(lambda side=side: side.transport.pump.pause_s == math.inf)


async def test_a_reader_faster_than_the_order_waits_for_it() -> None:
    async with prefilled(lease=None) as ((worker,), offer), running(build_memories(ONE, **SIZES)) as (reader,):
        load = asyncio.ensure_future(reader.load(order(offer)))
        await asyncio.sleep(0.3)
        assert not load.done()
        await worker.server.order(1, "request", 30.0)
        await load
        assert wrong_elements(reader.memory, HERE, 0, TOKENS) == 0


async def test_an_aborted_load_reads_nothing() -> None:
    async with prefilled() as (_, offer), running(build_memories(ONE, **SIZES)) as (reader,):
        aborted = asyncio.Event()
        aborted.set()
        with pytest.raises(LoadAborted):
            await reader.loader.load(order(offer), aborted)
        assert untouched(reader.memory, ())


@pytest.mark.parametrize("what", ["restarted", "other model", "nobody there", "not one of ours"])
async def test_a_peer_that_is_not_the_right_one_is_an_error(what: str) -> None:
    async with contextlib.AsyncExitStack() as stack:
        (worker,), offer = await stack.enter_async_context(prefilled())
        options = {"model": "another"} if what == "other model" else {}
        (reader,) = await stack.enter_async_context(running(build_memories(ONE, **SIZES), **options))
        address = offer.workers[0]
        if what == "restarted":
            address = WorkerAddress(address.host, address.port, "0" * 32)
        if what == "nobody there":
            await worker.server.close()
        if what == "not one of ours":
            server = await asyncio.start_server(lambda _, writer: writer.write(b"\xff" * 64), "127.0.0.1", 0)
            stack.push_async_callback(close_server, server)
            address = WorkerAddress("127.0.0.1", server.sockets[0].getsockname()[1], address.incarnation)
        message = {
            "restarted": "has been restarted",
            "other model": "another model",
            "nobody there": "cannot be reached",
            "not one of ours": "connection broke",
        }[what]
        with pytest.raises(LoadError, match=message):
            await reader.load(order(replace(offer, workers=(address,))))
        assert untouched(reader.memory, ())


async def close_server(server: asyncio.Server) -> None:
    server.close()


async def test_garbage_on_the_control_port_harms_nobody() -> None:
    async with prefilled() as ((worker,), offer), running(build_memories(ONE, **SIZES)) as (reader,):
        for garbage in (b"\xff" * 100, b"\x00\x00\x00\x02\x91\x01", b"GET / HTTP/1.1\r\n\r\n"):
            stream, writer = await asyncio.open_connection("127.0.0.1", worker.address.port)
            writer.write(garbage)
            assert await asyncio.wait_for(stream.read(), HUNG_S) == b""
            writer.close()
        await reader.load(order(offer))
        assert wrong_elements(reader.memory, HERE, 0, TOKENS) == 0
