"""Reading a KV cache while it is computed: what a worker tells of it, what is read when, and what ends it."""

from __future__ import annotations

import asyncio
import math
import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexgen2.vllm_plugin.kv_connector.follower import Follower
from hexgen2.vllm_plugin.kv_connector.leases import LeaseBook, LeaseState
from hexgen2.vllm_plugin.kv_connector.loader import LoadAborted, LoadError, LoadOrder
from hexgen2.vllm_plugin.kv_connector.params import VERSION, Stream, decode_source, encode_offer, stream_key
from hexgen2.vllm_plugin.kv_connector.streams import (
    FORGET_S,
    NOTHING,
    Progress,
    StreamBook,
    StreamEnd,
    StreamStep,
    Wanted,
)
from hexgen2.vllm_plugin.kv_connector.transfer_plan import received_bytes
from hexgen2.vllm_plugin.kv_connector.wire import Advance
from tests.waiting import HUNG_S, until

from .layouts import Stage, build_memories, untouched, write_sequence, wrong_elements
from .test_messages import OFFER
from .test_transfer import HERE, ONE, SIZES, THERE, TOKENS, layout, needs_nixl, needs_process, running
from .workers import Worker

LAYERS = ("a", "b", "c")


def step(done: int, ahead: int, *blocks: int, key: str = "k", request: str = "r") -> StreamStep:
    return StreamStep(key, request, done, ahead, blocks)


def looked(book: StreamBook, known: int = 0) -> tuple[LeaseState, Progress, tuple[int, ...]]:
    state, _, progress, blocks = book.look("k", known)
    return state, progress, blocks


async def test_progress_rises_with_layers_and_steps() -> None:
    book = StreamBook(LAYERS, LeaseBook())
    assert looked(book) == (LeaseState.UNKNOWN, NOTHING, ())
    book.begin_step([step(0, 96, 4)], [])
    assert looked(book) == (LeaseState.HELD, Progress(0, 0, 96), (4,))
    for number, layer in enumerate(LAYERS[:-1], 1):
        book.layer_done(layer)
        assert looked(book)[1] == Progress(0, number, 96)
    book.layer_done(LAYERS[-1])
    assert looked(book)[1] == Progress(96)
    book.end_step()
    assert looked(book)[1] == Progress(96)
    book.begin_step([step(96, 130, 9)], [])
    book.layer_done("b")  # out of the table's order: it shows at the step's end
    assert looked(book, 1) == (LeaseState.HELD, Progress(96), (9,))
    book.end_step()
    assert looked(book)[1:] == (Progress(130), (4, 9))


async def test_a_device_that_lags_behind_is_waited_for() -> None:
    reached = 0

    def fence():  # a point in the device's work, which this thread runs ahead of
        fence.points += 1
        mine = fence.points
        return lambda: reached >= mine

    fence.points = 0
    book = StreamBook(LAYERS, LeaseBook(), fence)
    book.begin_step([step(0, 96, 4)], [])
    book.end_step()
    await asyncio.sleep(0.01)
    assert looked(book)[:2] == (LeaseState.UNKNOWN, NOTHING)
    reached = 1
    await until(lambda: looked(book)[1] == Progress(0, 0, 96))
    reached = 2
    await until(lambda: looked(book)[1] == Progress(96))


async def test_a_stream_goes_on_as_a_lease() -> None:
    leases = LeaseBook()
    book = StreamBook(LAYERS, leases)
    book.begin_step([step(0, 96, 4)], [])
    now = time.monotonic()
    assert book.announce("k", "reader", hold_s=50, now=now)[0] is LeaseState.HELD
    book.end_step()
    leases.order(7, "r", duration_s=1, now=now)
    book.leased("k", 7)
    assert leases.collect(now + 10) == []  # held by the reader that came before the lease
    assert book.finish("k", "reader")[0] is LeaseState.HELD
    assert [ended.lease for ended in leases.collect(now + 10)] == [7]
    assert book.finish("k", "reader")[0] is LeaseState.ENDED


@pytest.mark.parametrize("begun", [False, True])
async def test_a_release_that_comes_early_is_kept(begun: bool) -> None:
    leases = LeaseBook()
    book = StreamBook(LAYERS, leases)
    if begun:
        book.begin_step([step(0, 96, 4)], [])
    book.release("k")
    leases.order(1, "r", duration_s=30, now=0)
    book.leased("k", 1)
    assert [ended.expired for ended in leases.collect(now=1)] == [False]


async def test_what_is_over_stays_over() -> None:
    book = StreamBook(LAYERS, LeaseBook())
    book.begin_step([step(0, 96, 4)], [])
    book.begin_step([], [StreamEnd("k", "preempted")])
    assert book.finish("k", "reader") == (LeaseState.ENDED, "preempted")
    book.begin_step([step(0, 96, 5)], [])
    assert looked(book)[0] is LeaseState.ENDED
    book.forget(time.monotonic())
    assert looked(book)[0] is LeaseState.ENDED
    book.forget(time.monotonic() + FORGET_S + 1)
    assert looked(book)[0] is LeaseState.UNKNOWN


class Counting(LeaseBook):
    """Counts how often it is asked for a lease's state."""

    asked = 0

    def state(self, lease: int) -> LeaseState:
        self.asked += 1
        return super().state(lease)


async def test_forgetting_looks_at_the_old_streams_alone() -> None:
    """Under the lock for which vLLM's thread waits."""
    leases = Counting()
    book, now = StreamBook(LAYERS, leases), time.monotonic()
    for number in range(1, 101):
        leases.order(number, "r", duration_s=10 * FORGET_S, now=now)
        book.leased(f"k{number}", number)
    book.forget(now)
    assert leases.asked == 0
    book.forget(now + FORGET_S + 1)
    assert leases.asked == 100, "they are held, so none is dropped"
    book.forget(now + FORGET_S + 2)
    assert leases.asked == 100, "again after as long only"
    for number in range(1, 51):
        leases.release(number)
    leases.collect(now)
    leases.asked = 0
    book.forget(now + 2 * FORGET_S + 3)
    assert leases.asked == 100
    assert len(book._streams) == 50


async def test_one_key_for_two_requests_ends_the_stream() -> None:
    book = StreamBook(LAYERS, LeaseBook())
    book.begin_step([step(0, 96, 4)], [])
    book.begin_step([step(0, 96, 5, request="other")], [])
    assert looked(book)[0] is LeaseState.ENDED


async def test_waiting_ends_with_news_or_with_the_stream() -> None:
    book = StreamBook(LAYERS, LeaseBook())
    begun, layer, whole = Wanted(0, 0), Wanted(2 * 96, 200), Wanted(10**6, 96)
    waits = [asyncio.ensure_future(book.wait("k", wanted, 30)) for wanted in (begun, layer, whole)]
    await asyncio.sleep(0)
    book.begin_step([step(0, 96, 4)], [])
    await asyncio.wait_for(waits[0], HUNG_S)
    await book.wait("k", begun, 30)  # it is there already
    book.layer_done("a")
    await asyncio.sleep(0.01)
    assert not waits[1].done()
    book.layer_done("b")
    await asyncio.wait_for(waits[1], HUNG_S)
    assert not waits[2].done()
    book.end_step()
    await asyncio.wait_for(waits[2], HUNG_S)
    waiting = asyncio.ensure_future(book.wait("k", Wanted(10**6, 10**6), 30))
    await asyncio.sleep(0)
    await asyncio.to_thread(book.begin_step, [], [StreamEnd("k", "aborted")])
    await asyncio.wait_for(waiting, HUNG_S)
    await book.wait("k", Wanted(10**6, 10**6), 30)
    await book.wait("other", begun, 0.01)


@given(st.data())
def test_each_token_of_each_part_is_read_once_and_never_too_early(data: st.DataObject) -> None:
    layers = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=5))
    grids = data.draw(st.lists(st.sampled_from([1, 16, 32]), min_size=len(layers), max_size=len(layers)))
    start = 32 * data.draw(st.integers(0, 2))
    stop = start + data.draw(st.integers(1, 200))
    follower = Follower(start, stop, layers, grids)
    read = [start] * len(layers)
    done = 0
    while done < stop:
        ahead = data.draw(st.integers(done + 1, stop + 20))
        for news in (*(Advance("held", "", done, n, ahead, ()) for n in range(5)),
                     Advance("held", "", ahead, 0, 0, ())):  # fmt: skip
            if data.draw(st.booleans()) and news.done < stop:
                continue  # this one was not heard of
            for span in follower.spans(news):
                for part in span.parts:
                    assert span.start == read[part]
                    read[part] = span.stop
                    assert span.stop <= (news.ahead if layers[part] < news.layers else news.done)
                    assert span.stop == stop or span.stop % grids[part] == 0
        done = ahead
    assert follower.complete
    assert read == [stop] * len(layers)


def test_the_stream_of_an_offer_needs_only_a_key() -> None:
    params = encode_offer(OFFER, "request")
    assert stream_key(params) is None
    early = {"do_remote_prefill": True, "hexgen_stream": {**params["hexgen_stream"], "key": "k1"}}
    assert decode_source(early) == Stream(VERSION, OFFER.engine, "k1", 30.0, OFFER.block_tokens, OFFER.workers)
    assert decode_source(params) == OFFER
    for wrong in (
        {"key": "k"},
        {**early["hexgen_stream"], "workers": []},
        {**early["hexgen_stream"], "version": 9},
    ):
        with pytest.raises(ValueError, match=r"missing|workers|version"):
            decode_source({"hexgen_stream": wrong})
    assert stream_key({"hexgen_stream": {"key": "x" * 65}}) is None


# Over NIXL.

CHUNKS = (0, 12, 24, 40)


def order_of(workers: list[Worker], request: str = "request") -> LoadOrder:
    stream = Stream(VERSION, "prefill", "k", 30.0, SIZES["block_tokens"], tuple(w.address for w in workers))
    return LoadOrder(request, stream, 0, TOKENS, HERE, SIZES["block_tokens"])


def begin(worker: Worker, done: int, ahead: int) -> None:
    first, end = -(-done // SIZES["block_tokens"]), -(-ahead // SIZES["block_tokens"])
    worker.streams.begin_step([StreamStep("k", "request", done, ahead, THERE[first:end])], [])


async def prefill(workers: list[Worker], upto: int = len(CHUNKS)) -> None:
    """Compute a sequence chunk by chunk and layer by layer; nothing is there before its word."""
    for done, ahead in pairwise(CHUNKS[:upto]):
        for worker in workers:
            begin(worker, done, ahead)
        for worker in workers:
            for shard in worker.memory.table.layers:
                write_sequence(worker.memory, THERE, ahead, only=shard.layer)
                worker.streams.layer_done(shard.layer)
                await asyncio.sleep(0.002)
            worker.streams.end_step()
        await asyncio.sleep(0.005)


@needs_nixl
@needs_process
@pytest.mark.parametrize("ends", ["under way", "as a lease", "long before"])
@pytest.mark.parametrize(
    ("senders", "receivers"),
    [
        (ONE, ONE),
        (layout((2, 4)), ONE),
        (ONE, layout((2, 4))),
        (layout((2, 3), (1, 1)), layout((1, 1), (2, 3))),
    ],
)
async def test_a_cache_is_read_while_it_is_computed(
    senders: list[Stage], receivers: list[Stage], ends: str
) -> None:
    async with (
        running(build_memories(senders, **SIZES)) as workers,
        running(build_memories(receivers, **SIZES)) as readers,
    ):

        async def lease() -> None:
            for worker in workers:
                await worker.server.order(1, "request", 30.0, "k")

        if ends == "long before":
            await prefill(workers)
            await lease()
        loads = [asyncio.ensure_future(reader.load(order_of(workers))) for reader in readers]
        if ends != "long before":
            await prefill(workers)
        if ends == "as a lease":
            await lease()
        for reader, load in zip(readers, loads, strict=True):
            reports = await asyncio.wait_for(load, HUNG_S)
            assert wrong_elements(reader.memory, HERE, 0, TOKENS) == 0
            assert untouched(reader.memory, HERE)
            assert sum(report.bytes for report in reports) == received_bytes(reader.memory.table, TOKENS)


@needs_nixl
@needs_process
async def test_a_prefill_that_is_broken_off_fails_the_load() -> None:
    async with (
        running(build_memories(ONE, **SIZES)) as (worker,),
        running(build_memories(ONE, **SIZES)) as (reader,),
    ):
        load = asyncio.ensure_future(reader.load(order_of([worker])))
        await prefill([worker], 3)
        assert not load.done()
        worker.streams.begin_step([], [StreamEnd("k", "the prefill was preempted")])
        with pytest.raises(LoadError, match="preempted"):
            await asyncio.wait_for(load, HUNG_S)


@needs_nixl
@needs_process
async def test_a_stream_that_ends_during_the_last_read_is_found_invalid(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with (
        running(build_memories(ONE, **SIZES)) as (worker,),
        running(build_memories(ONE, **SIZES)) as (reader,),
    ):
        await prefill([worker])
        read = reader.transport.read

        async def read_and_lose(*arguments):
            report = await read(*arguments)
            worker.streams.begin_step([], [StreamEnd("k", "the prefill was preempted")])
            return report

        monkeypatch.setattr(reader.transport, "read", read_and_lose)
        with pytest.raises(LoadError, match="lost during the read"):
            await asyncio.wait_for(reader.load(order_of([worker])), HUNG_S)


@needs_nixl
@needs_process
async def test_an_abort_ends_the_waiting_and_the_hold() -> None:
    async with (
        running(build_memories(ONE, **SIZES)) as (worker,),
        running(build_memories(ONE, **SIZES)) as (reader,),
    ):
        aborted = asyncio.Event()
        load = asyncio.ensure_future(reader.loader.load(order_of([worker]), aborted))
        await prefill([worker], 2)
        aborted.set()
        with pytest.raises(LoadAborted):
            await asyncio.wait_for(load, HUNG_S)
        await worker.server.order(1, "request", 0.0, "k")
        await until(lambda: bool(worker.ended))


@needs_nixl
@needs_process
async def test_a_prefill_that_stands_still_is_given_up() -> None:
    async with (
        running(build_memories(ONE, **SIZES)) as (worker,),
        running(build_memories(ONE, **SIZES), timeout_s=1.5) as (reader,),
    ):
        begin(worker, 0, 12)
        with pytest.raises(LoadError, match=r"not come further|did not answer"):
            await asyncio.wait_for(reader.load(order_of([worker])), HUNG_S)
        await until(lambda: worker.transport.pump.pause_s == math.inf)  # nobody reads, so nobody is helped


@needs_nixl
@needs_process
async def test_a_prefill_engine_that_dies_ends_the_load_at_once() -> None:
    async with (
        running(build_memories(ONE, **SIZES)) as (worker,),
        running(build_memories(ONE, **SIZES)) as (reader,),
    ):
        load = asyncio.ensure_future(reader.load(order_of([worker])))
        await prefill([worker], 2)
        await worker.server.close()
        with pytest.raises(LoadError, match=r"closed the connection|connection broke"):
            await asyncio.wait_for(load, HUNG_S)
