"""The engines and shares change while requests are served: none is lost, and those under way go on."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from hexgen2.coordinator import CoordinatorConfig, EngineEndpoint, RouteShare, Served
from hexgen2.emulator import EmulatedEngine, EmulatorConfig, LinearTiming
from hexgen2.specs.plan import Role
from tests.coordinator.conftest import MODEL, ROLES, Stand, expected, running, text_of
from tests.waiting import HUNG_S, until

SLOW = EmulatorConfig(model_names=(MODEL,), timing=LinearTiming(step_base_s=0.02), max_batch=64)


def config_of(stand: Stand, routes: dict[str, float]) -> CoordinatorConfig:
    """As `running` makes it, for engines that the stand has."""
    shares: dict[str, float] = {}
    for name, share in routes.items():
        for group in name.split(">"):
            shares[group] = min(1.0, shares.get(group, 0.0) + share)
    return stand.coordinator.config.model_copy(
        update={
            "engines": tuple(
                EngineEndpoint(
                    group_id=group,
                    role=ROLES[group[0]],
                    url=stand.engines[group].url,
                    share=share,
                    max_batch=64,
                )
                for group, share in shares.items()
            ),
            "routes": tuple(
                RouteShare(prefill=name.split(">")[0], decode=name.split(">")[1], share=share)
                for name, share in routes.items()
                if ">" in name
            ),
        }
    )


@contextlib.asynccontextmanager
async def extra(stand: Stand, group: str) -> AsyncIterator[EmulatedEngine]:
    """Another engine that the coordinator does not know yet."""
    async with EmulatedEngine(SLOW).running() as engine:
        stand.engines[group] = engine
        yield engine


async def test_new_shares_count_from_the_next_request_on() -> None:
    async with running({"c0": 1.0, "c1": 0.0}) as stand:
        await stand.complete()
        await stand.coordinator.update(config_of(stand, {"c0": 0.25, "c1": 0.75}))
        for _ in range(8):
            await stand.complete()
        assert (len(stand.received("c0")), len(stand.received("c1"))) == (3, 6)


async def test_an_engine_that_is_added_is_used_once_it_answers() -> None:
    async with running({"c0": 1.0}) as stand, extra(stand, "c1"):
        await stand.coordinator.update(config_of(stand, {"c1": 1.0}))
        await until(lambda: stand.coordinator.fleet.engines["c1"].up)
        assert (await stand.complete("a b", max_tokens=3))["choices"][0]["text"] == expected("a b", 3)
        assert len(stand.received("c1")) == 1


async def test_no_request_meets_an_engine_that_was_not_asked_yet() -> None:
    async with running({"c0": 1.0}) as stand, extra(stand, "c1"):
        await stand.coordinator.update(config_of(stand, {"c1": 1.0}))
        await stand.complete()  # at once: the only engine left is the new one
        assert len(stand.received("c1")) == 1


async def test_an_engine_that_goes_finishes_what_it_has() -> None:
    async with running({"c0": 1.0}, emulator=SLOW) as stand, extra(stand, "c1"):
        await stand.coordinator.update(config_of(stand, {"c0": 0.5, "c1": 0.5}))
        await until(lambda: stand.coordinator.fleet.engines["c1"].up)
        streams = [asyncio.create_task(stand.stream("a b", max_tokens=30)) for _ in range(6)]
        await until(lambda: len(stand.received("c0")) == 3)
        await stand.coordinator.update(config_of(stand, {"c1": 1.0}))
        assert await stand.coordinator.retire("c0", within_s=HUNG_S)
        assert "c0" not in stand.coordinator.fleet.engines
        for stream in streams:
            assert text_of(await stream) == expected("a b", 30)
        await stand.complete()
        assert len(stand.received("c0")) == 3
        assert await stand.metric("hexgen2:migrations_total") == 0


async def test_streams_of_an_engine_that_must_go_go_on_elsewhere() -> None:
    async with running({"c0": 1.0}, emulator=SLOW) as stand, extra(stand, "c1"):
        stream = asyncio.create_task(stand.stream("a b", max_tokens=60))
        await until(lambda: stand.engines["c0"].core.generation_tokens_total > 5)
        await stand.coordinator.update(config_of(stand, {"c1": 1.0}))
        assert not await stand.coordinator.retire("c0", within_s=0.2)
        assert text_of(await stream) == expected("a b", 60)
        assert await stand.metric("hexgen2:migrations_total") == 1


async def test_a_prefill_engine_is_needed_until_its_cache_is_fetched() -> None:
    """The decode engine has one slot: the second request waits for it with its prompt computed."""
    async with running({"p0>d0": 1.0}, emulator=SLOW) as stand, extra(stand, "p1"):
        fleet = stand.coordinator.fleet
        fleet.engines["d0"].gate.limit = 1
        streams = [asyncio.create_task(stand.stream("a b", max_tokens=20)) for _ in range(2)]
        await until(lambda: fleet.engines["d0"].gate.waiting == 1)
        assert fleet.engines["p0"].in_flight == 0
        await stand.coordinator.update(config_of(stand, {"p1>d0": 1.0}))
        fleet.engines["d0"].gate.limit = 1
        assert await stand.coordinator.retire("p0", within_s=HUNG_S)
        for stream in streams:
            assert text_of(await stream) == expected("a b", 20)
        assert stand.engines["d0"].kv_pulls == 2
        assert len(stand.received("p0")) == 2


async def test_engines_take_other_roles_under_way() -> None:
    async with running({"p0>d0": 1.0, "p1>d0": 0.0}, emulator=SLOW) as stand:
        stand.engines["d1"] = stand.engines["p1"]
        streams = [asyncio.create_task(stand.stream("a b", max_tokens=20)) for _ in range(4)]
        await until(lambda: len(stand.received("d0")) == 4)
        changed = config_of(stand, {"p0>d0": 1.0}).model_copy(update={"routes": ()})
        changed_roles: dict[str, Role] = {"p0": "decode", "d0": "prefill"}
        engines = {
            group: EngineEndpoint(
                group_id=group,
                role=role,
                url=stand.engines[group].url,
                share=1.0,
                max_batch=64,
            )
            for group, role in changed_roles.items()
        }
        routes = (RouteShare(prefill="d0", decode="p0", share=1.0),)
        await stand.coordinator.update(
            changed.model_copy(update={"engines": tuple(engines.values()), "routes": routes})
        )
        streams += [asyncio.create_task(stand.stream("a b", max_tokens=20)) for _ in range(4)]
        for stream in streams:
            assert text_of(await stream) == expected("a b", 20)
        assert stand.engines["p0"].kv_pulls == 4


async def test_nothing_is_lost_while_everything_changes_under_load() -> None:
    async with running({"c0": 1.0}, emulator=SLOW) as stand, contextlib.AsyncExitStack() as engines:
        done = asyncio.Event()
        answers: list[str] = []

        async def client() -> None:
            while not done.is_set():
                answers.append(text_of(await stand.stream("a b", max_tokens=8)))

        clients = [asyncio.create_task(client()) for _ in range(12)]
        for number in range(1, 6):
            await engines.enter_async_context(extra(stand, f"c{number}"))
            await stand.coordinator.update(config_of(stand, {f"c{number - 1}": 0.5, f"c{number}": 0.5}))
            await until(lambda n=number: stand.coordinator.fleet.engines[f"c{n}"].up)
            await stand.coordinator.update(config_of(stand, {f"c{number}": 1.0}))
            await stand.coordinator.retire(f"c{number - 1}", within_s=HUNG_S)
            await stand.engines[f"c{number - 1}"].stop()
        done.set()
        await asyncio.gather(*clients)
        assert len(answers) >= len(clients)
        assert set(answers) == {expected("a b", 8)}
        assert set(stand.coordinator.fleet.engines) == {"c5"}


async def test_an_engine_cannot_move_under_one_name() -> None:
    async with running({"c0": 1.0}) as stand, extra(stand, "c1"):
        moved = config_of(stand, {"c0": 1.0}).engines[0].model_copy(update={"url": stand.engines["c1"].url})
        with pytest.raises(ValueError, match="c0 is at"):
            await stand.coordinator.update(stand.coordinator.config.model_copy(update={"engines": (moved,)}))
        await stand.complete()


@pytest.mark.parametrize("workers", [1, 2])
async def test_an_engine_that_ended_may_come_back_elsewhere(workers: int) -> None:
    """A change that fails starts what it had ended again, at ports that are free then."""
    async with running({"c0": 1.0}, workers=workers) as stand:
        await stand.complete()
        stand.engines["c0"].kill()
        await until(lambda: not stand.coordinator.fleet.engines["c0"].up)
        async with extra(stand, "c0"):
            await stand.coordinator.update(config_of(stand, {"c0": 1.0}))
            assert (await stand.complete("a b", max_tokens=3))["choices"][0]["text"] == expected("a b", 3)
            assert len(stand.received("c0")) == 1


async def test_a_listener_hears_of_lengths() -> None:
    class Ear:
        def __init__(self) -> None:
            self.came = 0
            self.heard: list[Served] = []

        def arrived(self) -> None:
            self.came += 1

        def served(self, request: Served) -> None:
            self.heard.append(request)

    async with running({"p0>d0": 1.0}) as stand:
        ear = stand.coordinator.metrics.listener = Ear()
        await stand.complete("a b c", max_tokens=5)
        await stand.stream("a b c d", max_tokens=7)
        status, _, _ = await stand.post("/v1/completions", {"model": "other", "prompt": "a"})
        assert status == 404
        assert ear.came == 3
        assert [(one.prompt_tokens, one.output_tokens) for one in ear.heard] == [(3, 5), (4, 7)]
        assert str(ear.heard[0].path) == "p0->d0"
