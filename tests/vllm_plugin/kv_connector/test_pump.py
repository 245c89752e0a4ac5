"""How often the network is looked at: eagerly while bytes move, calmly while none do, never while nobody reads.
NIXL is not needed: looks are played, and so is the time that they and the pauses take.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexgen2.vllm_plugin.kv_connector.pump import (
    FIRST_PAUSE_S,
    LONGEST_PAUSE_S,
    LONGEST_SLEEP_S,
    PATIENCE,
    SHORTEST_PAUSE_S,
    Pace,
    Pump,
)
from tests.waiting import HUNG_S, until

NOTHING_S, EMPTY_LOOK_S = 0.0, 1e-6


class Network:
    """A network on which looks take `look_s` seconds, and a clock that goes on only by looks and pauses."""

    def __init__(self, look_s: float) -> None:
        self.look_s = look_s
        self.now = 0.0
        self.looks = 0
        self.slept: list[float] = []
        self.error: Exception | None = None
        self.pump = Pump(self.look, lambda: self.now, self.sleep)

    def look(self) -> None:
        self.looks += 1
        self.now += self.look_s
        if self.error is not None:
            raise self.error

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@asynccontextmanager
async def network(look_s: float) -> AsyncIterator[Network]:
    network = Network(look_s)
    yield network
    network.pump.close()


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def settled(work_share: float) -> list[float]:
    """The pauses in the end, where what comes in some time takes this share of it to take in."""
    pace, pauses, look_s = Pace(), [], 0.0
    for _ in range(300):
        look_s = min(EMPTY_LOOK_S + work_share * (pace.pause_s + look_s), 0.01)
        pace = pace.after(look_s)
        pauses.append(pace.pause_s)
    return pauses[-100:]


@pytest.mark.parametrize(
    ("work_share", "least_s", "most_s"),
    [
        (2.0, 0.0, 0.0),  # the processor is the limit
        (0.6, 0.0, SHORTEST_PAUSE_S),
        (0.3, 0.0, 2 * SHORTEST_PAUSE_S),
        (0.02, LONGEST_PAUSE_S, LONGEST_PAUSE_S),  # a slow link
        (0.0, LONGEST_PAUSE_S, LONGEST_PAUSE_S),  # nothing to do for this side
    ],
)
def test_the_pause_follows_what_there_is_to_do(work_share: float, least_s: float, most_s: float) -> None:
    pauses = settled(work_share)
    assert least_s <= min(pauses)
    assert max(pauses) <= most_s


def test_good_looks_lead_from_the_longest_pause_to_none() -> None:
    pace, looks = Pace(LONGEST_PAUSE_S), 0
    while pace.pause_s:
        pace, looks = pace.after(0.7 * pace.pause_s), looks + 1
    assert looks == math.ceil(math.log2(LONGEST_PAUSE_S / SHORTEST_PAUSE_S)) + 1


def test_without_a_pause_some_looks_may_be_in_vain() -> None:
    pace = Pace(0.0)
    for _ in range(PATIENCE - 1):
        pace = pace.after(EMPTY_LOOK_S)
        assert pace.pause_s == 0
    assert pace.after(SHORTEST_PAUSE_S) == Pace(0.0)  # begins anew
    assert pace.after(EMPTY_LOOK_S) == Pace(SHORTEST_PAUSE_S)


@given(st.lists(st.floats(0, 1), max_size=50))
def test_the_pause_keeps_its_bounds(looks_s: list[float]) -> None:
    pace = Pace()
    for look_s in looks_s:
        pace = pace.after(look_s)
        assert not pace.pause_s or SHORTEST_PAUSE_S <= pace.pause_s <= LONGEST_PAUSE_S


async def test_nobody_looks_where_nobody_reads() -> None:
    async with network(NOTHING_S) as net:
        await turns(5)
        assert net.looks == 0
        assert net.pump.pause_s == math.inf


async def test_while_bytes_move_the_looks_follow_closely_and_then_calm_down() -> None:
    async with network(FIRST_PAUSE_S) as net:
        net.pump.serve("a read")
        await until(lambda: net.looks > 100)
        assert net.slept[0] < FIRST_PAUSE_S
        assert net.slept[-1] == 0.0
        before, net.look_s = len(net.slept), EMPTY_LOOK_S
        await until(lambda: net.pump.pause_s == LONGEST_PAUSE_S)
        assert len(net.slept) - before < PATIENCE + 20  # from here on the event loop waits between looks
        before = len(net.slept)
        net.pump.serve("another read")
        await until(lambda: len(net.slept) > before)
        assert net.slept[before] < 2 * FIRST_PAUSE_S


async def test_a_peer_that_announces_a_read_does_not_slow_down_another() -> None:
    async with network(FIRST_PAUSE_S) as net:
        net.pump.serve("a read")
        await until(lambda: net.pump.pause_s == 0)
        before = len(net.slept)
        net.pump.serve("another read")
        await until(lambda: len(net.slept) > before)
        assert net.slept[before] == 0


async def test_looks_end_with_the_last_read() -> None:
    async with network(EMPTY_LOOK_S) as net:
        for reading in ("one", "two", "two"):
            net.pump.serve(reading)
        net.pump.served("two")
        net.pump.served("one")
        await until(lambda: net.pump.pause_s == LONGEST_PAUSE_S)
        net.pump.served("two")
        await until(lambda: net.pump.pause_s == math.inf)
        looks = net.looks
        await turns(5)
        assert net.looks == looks


async def test_helping_for_a_time_ends_with_it() -> None:
    async with network(SHORTEST_PAUSE_S) as net:
        net.pump.serve_for(0.01)
        net.pump.serve_for(0.001)  # does not shorten it
        await until(lambda: net.pump.pause_s == math.inf)
        assert 0.01 <= net.now < 0.011


async def test_the_loop_does_its_other_work_in_between() -> None:
    async with network(SHORTEST_PAUSE_S) as net:
        net.pump.serve("a read")
        for _ in range(20):
            before = net.now
            await asyncio.sleep(0)
            assert net.now - before <= LONGEST_SLEEP_S + SHORTEST_PAUSE_S


async def test_a_watched_read_is_asked_after_each_look_until_it_is_over() -> None:
    async with network(SHORTEST_PAUSE_S) as net:
        asked = 0

        def over() -> bool:
            nonlocal asked
            asked += 1
            return asked == 40

        await asyncio.wait_for(net.pump.watch(over), HUNG_S)
        assert (asked, net.looks) == (40, 40)
        await until(lambda: net.pump.pause_s == math.inf)


async def test_what_asking_raises_is_the_watchers_alone() -> None:
    async with network(SHORTEST_PAUSE_S) as net:

        def broken() -> bool:
            raise ValueError("broken")

        ended = asyncio.Event()
        other = asyncio.ensure_future(net.pump.watch(ended.is_set))
        with pytest.raises(ValueError, match="broken"):
            await asyncio.wait_for(net.pump.watch(broken), HUNG_S)
        assert not other.done()
        ended.set()
        await asyncio.wait_for(other, HUNG_S)


async def test_a_watcher_that_gives_up_is_asked_no_more() -> None:
    async with network(SHORTEST_PAUSE_S) as net:
        watching = asyncio.ensure_future(net.pump.watch(lambda: False))
        await until(lambda: net.looks > 3)
        watching.cancel()
        await until(lambda: net.pump.pause_s == math.inf)


async def test_looks_that_fail_are_seldom_and_reads_are_asked_all_the_same() -> None:
    async with network(SHORTEST_PAUSE_S) as net:
        net.error = RuntimeError("NIXL")
        await asyncio.wait_for(net.pump.watch(lambda: net.looks == 2), HUNG_S)
        assert net.slept == []  # no short pauses


async def test_a_closed_pump_looks_no_more() -> None:
    async with network(SHORTEST_PAUSE_S) as net:
        net.pump.serve("a read")
        net.pump.close()
        net.pump.serve("another")
        await turns(5)
        assert net.looks == 0
