"""The decode engine's keeper of leases, and what it remembers of peers. NIXL is not needed."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator

import pytest

from hexgen2.vllm_plugin.kv_connector.keeper import LeaseKeeper
from hexgen2.vllm_plugin.kv_connector.keyed_locks import KeyedLocks
from hexgen2.vllm_plugin.kv_connector.params import VERSION, Offer, WorkerAddress
from tests.waiting import HUNG_S, until


@pytest.fixture
def port() -> Iterator[int]:
    """A port that refuses: it is taken, and nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


async def test_peers_that_cannot_be_reached_leave_nothing_behind(port: int) -> None:
    keeper = LeaseKeeper("model", HUNG_S)
    try:
        for number in range(1, 6):
            worker = WorkerAddress("127.0.0.1", port, f"start-{number}")
            keeper.release(Offer(VERSION, "prefill", number, 30.0, 8, 8, (0,), (worker,)))
        await until(lambda: not keeper._tasks)
        left = (keeper._locks, keeper._connections, keeper._idle, keeper._tracked)
        assert [len(kept) for kept in left] == [0, 0, 0, 0]
    finally:
        keeper.close()


async def test_who_waits_for_a_key_gets_it_in_turn_and_no_key_stays() -> None:
    locks, inside, most = KeyedLocks(), 0, 0

    async def work(fails: bool) -> None:
        nonlocal inside, most
        async with locks.holding("a"):
            inside += 1
            most = max(most, inside)
            await asyncio.sleep(0)
            inside -= 1
            if fails:
                raise OSError

    results = await asyncio.gather(*(work(number % 2 == 0) for number in range(6)), return_exceptions=True)
    assert [type(result) for result in results] == [OSError, type(None)] * 3
    assert most == 1
    assert len(locks) == 0


async def test_other_keys_do_not_wait() -> None:
    locks = KeyedLocks()
    async with locks.holding("a"), asyncio.timeout(HUNG_S), locks.holding("b"):
        assert len(locks) == 2


async def test_a_waiter_that_gives_up_leaves_nothing_behind() -> None:
    locks = KeyedLocks()

    async def wait() -> None:
        async with locks.holding("a"):
            raise AssertionError("the lock is held by another")

    async with locks.holding("a"):
        waiting = asyncio.ensure_future(wait())
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert len(locks) == 1
    assert len(locks) == 0
