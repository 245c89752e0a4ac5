"""Overload: who does not get a place hears so at once, and nobody starves."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Hashable
from typing import Any, cast

import pytest

from hexgen2.coordinator import ApiKeys, Limits
from hexgen2.coordinator.admission import Admission, AdmissionLimits
from hexgen2.coordinator.errors import ApiError, no_path
from hexgen2.coordinator.fleet import Place, Want
from hexgen2.emulator import EmulatorConfig, LinearTiming
from tests.waiting import HUNG_S, until

from .conftest import Stand, running

SMALL, LARGE = 1.0, 4.0  # in places


class Hall:
    """A room of `capacity` places for each lane (a lane: whether the request needs one engine)."""

    def __init__(self, capacity: float) -> None:
        self.capacity = capacity
        self.taken: dict[Hashable, float] = {False: 0.0, True: 0.0}
        self.error: ApiError | None = None
        self.unanswered = 0

    @property
    def full(self) -> bool:
        return all(taken >= self.capacity for taken in self.taken.values())

    def lane(self, want: Want) -> Hashable:
        return want.one_engine

    def patience_s(self, want: Want) -> float | None:  # noqa: ARG002 - of a room whose engines are up
        return None

    def place(self, want: Want) -> Place | None:
        if self.error is not None:
            raise self.error
        if self.taken[want.one_engine] >= self.capacity:
            return None
        self.taken[want.one_engine] += want.weight
        return cast(Place, _Seat(self, want))


class _Seat:
    def __init__(self, hall: Hall, want: Want) -> None:
        self._hall, self._want = hall, want

    def leave(self) -> None:
        self._hall.taken[self._want.one_engine] -= self._want.weight


def admission(capacity: float = 1, **changes: Any) -> Admission:
    limits = {"queue": 100, "wait_s": HUNG_S, "per_key": None} | changes
    hall = Hall(capacity)
    hall.taken[True] = 1000.0  # `full` is about the other lane
    return Admission(hall, AdmissionLimits(**limits))


class Served:
    """Requests against an admission, each holding its place until `release` is called."""

    def __init__(self, door: Admission) -> None:
        self.door = door
        self.order: list[str] = []
        self.gate = asyncio.Semaphore(0)
        self.tasks: list[asyncio.Task[None]] = []

    async def add(
        self, name: str, size: float = SMALL, priority: int = 0, key: str = "", one_engine: bool = False
    ) -> None:
        want = Want(one_engine, weight=size, priority=priority, long=size > SMALL)

        async def hold() -> None:
            async with self.door.admitted(key, want):
                self.order.append(name)
                await self.gate.acquire()

        self.tasks.append(asyncio.create_task(hold()))
        await asyncio.sleep(0)

    async def finish(self) -> list[str]:
        for _ in self.tasks:
            self.gate.release()
            await asyncio.sleep(0.001)
        await asyncio.gather(*self.tasks)
        return self.order


async def test_in_order_of_arrival() -> None:
    served = Served(admission(2))
    for name in "abcdef":
        await served.add(name)
    assert (served.order, served.door.running, served.door.waiting) == (["a", "b"], 2, 4)
    assert await served.finish() == list("abcdef")
    assert (served.door.running, served.door.waiting) == (0, 0)


async def test_lower_priority_numbers_go_first() -> None:
    served = Served(admission())
    for name, priority in (("first", 0), ("late", 5), ("mid", 0), ("soon", -1), ("mid2", 0)):
        await served.add(name, priority=priority)
    assert await served.finish() == ["first", "soon", "mid", "mid2", "late"]


async def test_long_and_short_prompts_do_not_starve_each_other() -> None:
    """Three places to the short ones for each to the long ones, which take four: twelve of those for one."""
    served = Served(admission())
    await served.add("first")  # holds the only place
    for number in range(3):
        await served.add(f"L{number}", LARGE)
    for number in range(30):
        await served.add(f"s{number}")
    order = await served.finish()
    assert [place for place, name in enumerate(order[1:]) if name[0] == "L"] == [12, 25, 32]
    assert [name for name in order[1:] if name[0] == "s"] == [f"s{number}" for number in range(30)]


async def test_a_flood_of_long_prompts_leaves_the_short_ones_their_part() -> None:
    served = Served(admission(4))
    for number in range(20):
        await served.add(f"L{number}", LARGE)
    assert served.order == ["L0"], "one long prompt fills the four places"
    for number in range(6):
        await served.add(f"s{number}")
    order = await served.finish()
    assert order.index("s5") < order.index("L2")


async def test_one_lane_that_is_full_does_not_hold_up_another() -> None:
    served = Served(admission())
    hall = cast(Hall, served.door._room)
    for name in "ab":
        await served.add(name)
    hall.taken[True] = 0.0
    await served.add("other", one_engine=True)
    assert served.order == ["a", "other"]
    await served.finish()


async def test_where_waiting_does_not_help_nobody_waits() -> None:
    served = Served(admission())
    hall = cast(Hall, served.door._room)
    for name in "abc":
        await served.add(name)
    hall.error = no_path()
    served.door.refill()
    done = await asyncio.gather(*served.tasks[1:], return_exceptions=True)
    assert [getattr(error, "code", None) for error in done] == ["no_engine_available"] * 2
    assert served.door.waiting == 0
    served.gate.release()
    await served.tasks[0]


async def test_a_full_queue_refuses_at_once() -> None:
    served = Served(admission(1, queue=2))
    for name in "abc":
        await served.add(name)
    with pytest.raises(ApiError) as refused:
        served.door.refuse_early("")
    assert (refused.value.status, refused.value.code) == (429, "rate_limit_exceeded")
    assert refused.value.retry_after_s is not None
    await served.finish()
    served.door.refuse_early("")


async def test_waiting_is_bounded() -> None:
    served = Served(admission(1, wait_s=0.05))
    await served.add("a")
    with pytest.raises(ApiError):
        async with served.door.admitted("", Want()):
            pass
    assert served.door.waiting == 0
    await served.finish()


async def test_a_burst_after_a_quiet_time_waits() -> None:
    """How fast requests came then says nothing of how fast they are served."""
    served = Served(admission(1, wait_s=HUNG_S))
    await served.add("before")
    await served.finish()
    for number in range(20):
        await served.add(str(number))
    assert (served.door.running, served.door.waiting) == (1, 19)
    await served.finish()


async def test_a_queue_that_would_take_too_long_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """One request a second ends, so those that wait take nearly as many seconds as one may wait."""
    now = 100.0
    monkeypatch.setattr("hexgen2.coordinator.admission._now", lambda: now)
    served = Served(admission(1, wait_s=HUNG_S))
    for number in range(50):
        await served.add(str(number))
    served.door.refuse_early("")  # nothing is known yet
    for count in (2, 3):
        now += 1.0
        served.gate.release()
        await until(lambda count=count: len(served.order) == count)
    with pytest.raises(ApiError) as refused:
        served.door.refuse_early("")
    assert (refused.value.status, refused.value.retry_after_s) == (429, pytest.approx(48.0, rel=0.06))
    await served.finish()


async def test_a_burst_is_bounded_by_how_long_requests_took_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """One place and ten seconds for each: in 60 s it is worth waiting for the first few only."""
    now = 100.0
    monkeypatch.setattr("hexgen2.coordinator.admission._now", lambda: now)
    served = Served(admission(1, wait_s=HUNG_S))
    await served.add("before")
    now += 10.0
    await served.finish()
    now += 1000.0
    for number in range(8):
        await served.add(str(number))
    assert (served.door.running, served.door.waiting) == (1, 4)
    for _ in range(5):
        served.gate.release()
    await asyncio.gather(*served.tasks, return_exceptions=True)
    assert served.order == ["before", "0", "1", "2", "3", "4"]


async def test_a_stall_that_is_over_is_not_held_against_who_comes_next(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("hexgen2.coordinator.admission._now", lambda: now)
    served = Served(admission(1, wait_s=HUNG_S))
    for name in "abc":
        await served.add(name)
    now += 1.0
    served.gate.release()
    await until(lambda: served.order == ["a", "b"])
    now += 100.0  # nothing ends
    served.gate.release()
    await until(lambda: served.order == ["a", "b", "c"])
    now += 30.0  # in which nobody comes
    for number in range(20):
        await served.add(str(number))
    assert served.door.waiting >= 5
    for _ in served.tasks:
        served.gate.release()
    await asyncio.gather(*served.tasks, return_exceptions=True)


async def test_one_may_wait_however_slowly_requests_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else nobody would ever find out that they end faster again."""
    served = Served(admission(1, wait_s=HUNG_S))
    monkeypatch.setattr(served.door._pace, "seconds_for", lambda count, _: 1e9 * count)
    for name in "ab":
        await served.add(name)
    assert (served.order, served.door.waiting) == (["a"], 1)
    with pytest.raises(ApiError):
        served.door.refuse_early("")
    await served.finish()


async def test_prompts_that_queue_at_engines_count_as_who_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Free places are no chance where prompts are slow: first tokens would come ever later."""
    hall = Hall(10)
    served = Served(Admission(hall, AdmissionLimits(queue=100, wait_s=10.0, per_key=None)))
    monkeypatch.setattr(served.door._pace, "seconds_for", lambda count, _: 1.0 * count)
    hall.unanswered = 7
    await served.add("within the limit")
    hall.unanswered = 8
    with pytest.raises(ApiError) as refused:
        served.door.refuse_early("")
    assert refused.value.status == 429
    assert refused.value.retry_after_s == pytest.approx(9.0), "all that are before it, and itself"
    await served.add("told so")
    assert served.order == ["within the limit"]
    served.gate.release()
    told = await asyncio.gather(*served.tasks, return_exceptions=True)
    assert [type(one) for one in told] == [type(None), ApiError]


async def test_without_patience_nobody_waits_for_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    served = Served(admission(1, wait_s=2 * HUNG_S))
    await served.add("first")
    monkeypatch.setattr(served.door._room, "patience_s", lambda _: 0.0)
    with pytest.raises(ApiError) as refused:
        async with asyncio.timeout(HUNG_S), served.door.admitted("", Want()):
            pass
    assert refused.value.code == "no_engine_available"
    await served.finish()


async def test_a_client_that_leaves_the_queue_leaves_no_trace() -> None:
    served = Served(admission(1))
    for name in "abc":
        await served.add(name)
    served.tasks[1].cancel()
    await asyncio.sleep(0)
    assert served.door.waiting == 1
    # Leaving at the very moment at which the place is given must not lose the place.
    served.gate.release()
    served.tasks[2].cancel()
    await asyncio.gather(*served.tasks, return_exceptions=True)
    assert (served.door.running, served.door.waiting) == (0, 0)


@pytest.mark.parametrize("seed", range(20))
async def test_random_arrivals_and_departures_keep_count(seed: int) -> None:
    import random

    dice = random.Random(seed)
    door = admission(3, queue=8, wait_s=0.02)
    peak = 0

    async def one() -> None:
        nonlocal peak
        async with door.admitted("", Want(weight=1.0, priority=dice.randrange(3), long=dice.random() < 0.5)):
            peak = max(peak, door.running)
            await asyncio.sleep(dice.random() * 0.01)

    tasks = []
    for _ in range(60):
        tasks.append(asyncio.create_task(one()))
        await asyncio.sleep(dice.random() * 0.002)
        if dice.random() < 0.3:
            dice.choice(tasks).cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert (door.running, door.waiting) == (0, 0)
    assert peak <= 3


async def test_per_key_limits() -> None:
    limits = Limits(max_in_flight_per_key=1)
    slow = EmulatorConfig(timing=LinearTiming(step_base_s=0.01))
    async with running({"c0": 1.0}, emulator=slow, limits=limits, keys=ApiKeys(["one", "two"])) as stand:
        long = {"prompt": "a", "max_tokens": 100_000}
        task = asyncio.create_task(stand.post("/v1/completions", long, Authorization="Bearer one"))
        await until(lambda: stand.engines["c0"].core.running)
        short = {"prompt": "a", "max_tokens": 1}
        status, body, headers = await stand.post("/v1/completions", short, Authorization="Bearer one")
        assert (status, body["error"]["type"]) == (429, "rate_limit_error")
        assert int(headers["Retry-After"]) >= 1
        assert (await stand.post("/v1/completions", short, Authorization="Bearer two"))[0] == 200
        task.cancel()


async def test_overload_refuses_the_excess_and_serves_the_rest() -> None:
    """Ten times what fits while the engine stands still: the excess hears 429, the rest is served then."""
    limits = Limits(max_queue=32, capacity_factor=0.5)  # 32 at once on an engine with 64 slots

    async def ask(stand: Stand) -> int:
        status, _, headers = await stand.post("/v1/completions", {"prompt": "a", "max_tokens": 20})
        assert status != 429 or "Retry-After" in headers
        return status

    async with running({"c0": 1.0}, limits=limits) as stand:
        stand.engines["c0"].freeze()
        flood = [asyncio.create_task(ask(stand)) for _ in range(640)]
        await until(lambda: sum(one.done() for one in flood) == 640 - 64)
        stand.engines["c0"].thaw()
        assert Counter(await asyncio.gather(*flood)) == {429: 640 - 64, 200: 64}
        assert len(stand.engines["c0"].core.running) == 0
        assert stand.coordinator.admission.waiting == 0
        assert Counter(await asyncio.gather(*(ask(stand) for _ in range(30)))) == {200: 30}
        await stand.counted(640 - 64, "hexgen2:requests_total", status="429")
        await stand.counted(0, "hexgen2:requests_queued")
