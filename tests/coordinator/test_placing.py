"""Where requests go: held back while engines are full, drawn to prefix caches, never past an expired lease."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexgen2.coordinator import CoordinatorConfig, EngineEndpoint, Limits, RouteShare
from hexgen2.coordinator.bodies import Bodies
from hexgen2.coordinator.errors import ApiError
from hexgen2.coordinator.fleet import Fleet, Want
from hexgen2.coordinator.health import parse_kv_used
from hexgen2.coordinator.legs import Handoff
from hexgen2.coordinator.prefixes import BLOCK_BYTES, MAX_BLOCKS, PrefixIndex, prefix_blocks
from hexgen2.emulator import EmulatorConfig, LinearTiming
from hexgen2.specs.routing import Path
from tests.waiting import until

from .conftest import QUICK, expected, running, text_of

SLOW = EmulatorConfig(timing=LinearTiming(step_base_s=0.01))
LONG = "word " * 1000


def fleet(routes: dict[tuple[str, str], float], batch: int | None = 4, limits: Limits | None = None) -> Fleet:
    """Engines that are up, without any process."""
    shares: dict[str, float] = {}
    for (prefill, decode), share in routes.items():
        for group in (prefill, decode):
            shares[group] = shares.get(group, 0.0) + share
    config = CoordinatorConfig(
        served_model_names=("m",),
        engines=tuple(
            EngineEndpoint(
                group_id=group,
                role="prefill" if group[0] == "p" else "decode",
                url="http://127.0.0.1:1",
                share=min(share, 1.0),
                max_batch=batch,
            )
            for group, share in shares.items()
        ),
        routes=tuple(RouteShare(prefill=p, decode=d, share=share) for (p, d), share in routes.items()),
        limits=limits or Limits(capacity_factor=1.5),
    )
    built = Fleet(config)
    for engine in built.engines.values():
        built.mark_up(engine)
    return built


# Places


def test_no_engine_gets_more_than_its_places() -> None:
    crowd = fleet({("p0", "d0"): 0.9, ("p0", "d1"): 0.1})
    held = [crowd.place(Want()) for _ in range(14)]
    placed = [place for place in held if place is not None]
    assert held[12:] == [None, None], "1.5 times 4 at each of two engines"
    assert {name: crowd.engines[name].placed for name in ("d0", "d1")} == {"d0": 6.0, "d1": 6.0}
    assert crowd.full
    placed[0].leave()
    assert not crowd.full
    again = crowd.place(Want())
    assert again is not None
    assert again.path.target == placed[0].path.target
    for place in [*placed[1:], again]:
        place.leave()
    assert [engine.placed for engine in crowd.engines.values()] == [0.0] * 3


@pytest.mark.parametrize(
    ("prompt_s", "answer_s", "more"), [(0.1, 1.0, 1), (1.0, 1.0, 4), (9.0, 1.0, 8), (9.0, 0.0, 0)]
)
def test_prompts_under_way_have_places_beside_as_many_as_are_needed(
    monkeypatch: pytest.MonkeyPatch, prompt_s: float, answer_s: float, more: int
) -> None:
    """By Little's law, and no more than the prefill engine runs; none before an answer has ended."""
    now = 100.0
    monkeypatch.setattr("hexgen2.coordinator.fleet.time.monotonic", lambda: now)
    crowd = fleet({("p0", "d0"): 1.0}, batch=8, limits=Limits(capacity_factor=1.0))
    crowd.engines["d0"].become(crowd.engines["d0"].endpoint.model_copy(update={"max_batch": 4}))
    first = crowd.place(Want())
    assert first is not None
    now += prompt_s
    first.computed()
    if answer_s:
        now += answer_s
        first.leave()
        first.leave()  # twice counts once
    held = [crowd.place(Want()) for _ in range(20)]
    assert sum(place is not None for place in held) == (4 if answer_s else 3) + more


def test_a_long_prompt_takes_more_places_but_never_all() -> None:
    crowd = fleet({("p0", "d0"): 1.0}, batch=16)
    places = [crowd.place(Want(weight=100.0)) for _ in range(5)]
    assert [place is None for place in places] == [False] * 4 + [True]
    for place in places[:4]:
        assert place is not None
        place.leave()
    assert crowd.engines["d0"].placed == 0.0


def test_a_request_that_moves_takes_its_place_along() -> None:
    crowd = fleet({("p0", "d0"): 0.5, ("p0", "d1"): 0.5})
    place = crowd.place(Want(weight=1 / 3 + 1))
    assert place is not None
    other = next(path for path in crowd.planned.paths if path != place.path)
    first = place.path.target
    place.move(other)
    assert (crowd.engines[first].placed, crowd.engines[other.target].placed) == (0.0, 4 / 3)
    place.leave()
    assert crowd.engines[other.target].placed == 0.0


def test_an_engine_whose_kv_cache_is_full_gets_nothing_until_it_is_not() -> None:
    crowd = fleet({("p0", "d0"): 1.0})
    changes = []
    crowd.on_change = lambda: changes.append(crowd.engines["d0"].kv_used)
    assert crowd.place(Want()) is not None
    crowd.note_kv(crowd.engines["d0"], 0.99)
    assert crowd.place(Want()) is None
    crowd.note_kv(crowd.engines["d0"], 0.5)
    assert changes == [0.5]
    assert crowd.place(Want()) is not None


def test_retries_are_never_held_back() -> None:
    crowd = fleet({("p0", "d0"): 1.0}, batch=1)
    while crowd.place(Want()) is not None:
        pass
    assert crowd.choose() == Path("p0", "d0", 1.0)


def test_where_nothing_is_up_nobody_waits() -> None:
    crowd = fleet({("p0", "d0"): 1.0})
    crowd.mark_down(crowd.engines["p0"], "gone")
    crowd.returns("p0", False)
    with pytest.raises(ApiError, match="No complete path"):
        crowd.place(Want())
    assert not fleet({("p0", "d0"): 1.0}).full


def test_kv_usage_of_vllm_s_metrics() -> None:
    text = (
        b"# TYPE vllm:kv_cache_usage_perc gauge\n"
        b'vllm:kv_cache_usage_perc{engine="0",model_name="a"} 0.25\n'
        b'vllm:kv_cache_usage_perc{engine="1",model_name="a"} 5e-1\n'
    )
    assert parse_kv_used(text) == 0.5
    assert parse_kv_used(b"") == 0.0


async def test_a_burst_waits_before_its_first_leg() -> None:
    """Ten times the decode engine's slots at once: no more prompts are computed than it has places, and the
    prefill engine beside."""
    slow = EmulatorConfig(timing=LinearTiming(step_base_s=0.003))
    async with running({"p0>d0": 1.0}, emulator=slow, limits=Limits(capacity_factor=1.25), batch=8) as stand:
        peaks = {"legs": 0, "second": 0, "held": 0}

        async def look() -> None:
            engines = stand.coordinator.fleet.engines
            while True:
                peaks["legs"] = max(peaks["legs"], engines["p0"].in_flight + int(engines["d0"].in_flight))
                peaks["second"] = max(peaks["second"], engines["d0"].in_flight)
                peaks["held"] = max(peaks["held"], stand.engines["p0"].kv_store.held)
                await asyncio.sleep(0.001)

        looking = asyncio.create_task(look())
        answers = await asyncio.gather(*(stand.complete(f"r {n}", max_tokens=10) for n in range(80)))
        looking.cancel()
        for number, answer in enumerate(answers):
            assert answer["choices"][0]["text"] == expected(f"r {number}", 10)
        assert 1 <= peaks["second"] <= 8, "a decode engine is sent as many caches as it has slots"
        assert peaks["legs"] <= 10 + 8
        assert peaks["held"] <= 10 + 8
        assert await stand.metric("hexgen2:retries_total") == 0


async def test_a_decode_engine_that_dies_frees_who_waits_for_its_slots() -> None:
    routes = {"p0>d0": 0.5, "p0>d1": 0.5}
    async with running(routes, emulator=SLOW, batch=2, limits=Limits(capacity_factor=4.0)) as stand:
        tasks = [asyncio.create_task(stand.complete(f"r {n}", max_tokens=30)) for n in range(12)]
        await until(lambda: stand.coordinator.fleet.engines["d0"].gate.waiting)
        stand.engines["d0"].kill()
        for number, answer in enumerate(await asyncio.gather(*tasks)):
            assert answer["choices"][0]["text"] == expected(f"r {number}", 30)
        all_ = stand.coordinator.fleet.engines.values()
        await until(lambda: not any(e.placed or e.in_flight or e.gate.inside for e in all_))


# Prefixes


@given(st.text(max_size=3000), st.text(max_size=3000))
def test_prompts_share_the_blocks_of_their_common_beginning(one: str, other: str) -> None:
    common = "x" * 2 * BLOCK_BYTES
    first, second = (prefix_blocks({"prompt": common + rest}) for rest in (one, other))
    assert first[:2] == second[:2]
    assert len(first) == min(len((common + one).encode()) // BLOCK_BYTES, MAX_BLOCKS)
    if one != other:
        whole = [prefix_blocks({"prompt": common + rest + "." * BLOCK_BYTES}) for rest in (one, other)]
        assert whole[0] != whole[1] or one.startswith(other) or other.startswith(one)


def test_the_blocks_of_a_conversation_grow_with_its_turns() -> None:
    turns = [{"role": "user", "content": LONG}, {"role": "assistant", "content": LONG}]
    one = prefix_blocks({"messages": turns[:1]})
    two = prefix_blocks({"messages": turns})
    assert len(one) == 4
    assert two[: len(one)] == one
    assert len(two) > len(one)
    assert prefix_blocks({"messages": turns, "tools": [{"name": "f"}]})[:1] != two[:1]
    assert prefix_blocks({"messages": turns, "cache_salt": "s"})[:1] != two[:1]
    assert len(prefix_blocks({"prompt": "a" * 10**6})) == MAX_BLOCKS
    assert prefix_blocks({"prompt": list(range(1000))})
    for odd in ({}, {"prompt": None}, {"prompt": 3}, {"messages": "x"}, {"messages": [None, 3]}):
        assert prefix_blocks(odd) == ()


def test_a_prefix_draws_requests_to_where_it_was_computed_up_to_the_slack() -> None:
    limits = Limits(affinity_slack=6.0)
    crowd = fleet({("p0", "d0"): 0.5, ("p1", "d1"): 0.5}, batch=1000, limits=limits)
    shared = prefix_blocks({"prompt": LONG})
    first = crowd.choose(Want(prefix=shared))
    assert first is not None
    others = [crowd.choose(Want()) for _ in range(3)]
    assert first in others
    assert [crowd.choose(Want(prefix=shared)) for _ in range(5)] == [first] * 5
    taken = [crowd.choose(Want(prefix=shared)) for _ in range(200)]
    assert 100 - 7 <= taken.count(first) <= 100 + 7, "what everybody shares spreads"


def test_the_longest_common_beginning_wins() -> None:
    crowd = fleet({("p0", "d0"): 0.5, ("p1", "d1"): 0.5})
    paths = crowd.planned.paths
    index = PrefixIndex(crowd.engines, capacity=6)
    index.note((1, 2), paths[0])
    index.note((1, 2, 3, 4), paths[1])
    assert index.preferred((1, 2, 3, 9), paths) == {paths[1]}
    assert index.preferred((1, 2, 8), paths) == set(paths)
    assert index.preferred((7,), paths) == set()
    crowd.mark_down(crowd.engines["p1"], "gone")
    crowd.mark_up(crowd.engines["p1"])
    assert index.preferred((1, 2, 3), paths) == {paths[0]}, "what p1 had computed went with it"
    index.note(range(100, 120), paths[0])
    assert len(index) == 6


async def test_turns_of_a_conversation_stay_with_their_engines() -> None:
    async with running({"p0>d0": 0.5, "p1>d1": 0.5}) as stand:
        for _ in range(3):
            await stand.complete(LONG, max_tokens=2)
        for turn in range(3):
            await stand.complete(LONG + "and so on " * turn, max_tokens=2)
        assert sorted(len(stand.received(name)) for name in ("p0", "p1")) == [0, 6]


# Leases


def test_a_lease_is_trusted_for_four_fifths_of_its_time() -> None:
    handoff = Handoff({}, "p0", 0, since=100.0)
    assert not handoff.expired(123.9, 30.0)
    assert handoff.expired(124.1, 30.0)


@pytest.mark.parametrize("stream", [False, True])
async def test_an_expired_lease_is_not_used(stream: bool) -> None:
    """The second leg waits for a slot until the lease is over: fetched now, the cache would be another's."""
    timeouts = QUICK.model_copy(update={"kv_lease_s": 0.1})
    emulator = EmulatorConfig(lease_s=0.1)
    async with running({"p0>d0": 1.0}, emulator=emulator, timeouts=timeouts, batch=1) as stand:
        gate = stand.coordinator.fleet.engines["d0"].gate
        async with gate.turn(0):  # the only slot
            if stream:
                asked = asyncio.create_task(stand.stream("b", max_tokens=3))
            else:
                asked = asyncio.create_task(stand.complete("b", max_tokens=3))
            await until(lambda: gate.waiting)
            await asyncio.sleep(0.1)
        answer = await asked
        assert (text_of(answer) if stream else answer["choices"][0]["text"]) == expected("b", 3)
        assert await stand.metric("hexgen2:legs_without_kv_total", reason="lease_expired") == 1


async def test_a_prefill_engine_that_was_restarted_in_between_is_asked_again() -> None:
    async with running({"p0>d0": 1.0}, emulator=SLOW, batch=1, limits=Limits(capacity_factor=8.0)) as stand:
        first = asyncio.create_task(stand.complete("a", max_tokens=40))
        await until(lambda: stand.engines["d0"].core.running)
        second = asyncio.create_task(stand.complete("b", max_tokens=3))
        fleet_ = stand.coordinator.fleet
        await until(lambda: fleet_.engines["d0"].gate.waiting)
        fleet_.mark_down(fleet_.engines["p0"], "restarted")
        fleet_.mark_up(fleet_.engines["p0"])
        assert (await second)["choices"][0]["text"] == expected("b", 3)
        await first
        assert len(stand.received("p0")) == 3
        assert await stand.metric("hexgen2:engine_failures_total", group="p0", kind="down") == 1


# Memory


def test_bodies_are_bounded_together() -> None:
    bodies = Bodies(limit_bytes=100, largest_bytes=60)
    with bodies.held(None) as one:
        assert bodies.bytes == 60
        one.resize(10)
        with bodies.held(60), pytest.raises(ApiError, match="request bodies") as refused, bodies.held(40):
            pass
        assert (refused.value.status, refused.value.retry_after_s) == (503, 1.0)
        assert bodies.bytes == 10
    assert bodies.bytes == 0
    with Bodies(10, 60).held(1000) as lone:
        lone.resize(60)  # one alone is always taken: nothing would ever get in else
