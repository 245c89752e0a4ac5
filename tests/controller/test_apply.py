"""In which order a change of groups is put into effect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from hexgen2.controller.apply import Applier, ChangeFailed
from hexgen2.controller.carry import Carrier, Seat, seats_of
from hexgen2.controller.plans import plan_of
from hexgen2.controller.remedies import Demand, candidate
from hexgen2.coordinator import Coordinator, CoordinatorConfig
from hexgen2.deploy import EngineFailed
from hexgen2.specs.plan import Plan
from tests.controller.cases import long_answers, plan, setting

DEMAND = Demand(rps=1e9, horizon_s=600.0, restart_s=5.0)


class Recorder:
    """A coordinator and engines that only write down what is asked of them."""

    def __init__(self, of: Plan) -> None:
        self.done: list[tuple[str, list[str]]] = []
        self.urls: Mapping[str, str] = {group.id: f"http://{group.id}" for group in of.groups}
        self.config = SimpleNamespace(served_model_names=("m",))
        self.fleet = SimpleNamespace(engines={})
        self.failing: dict[str, Exception] = {}

    async def start(self, _: Plan, groups: Sequence[str]) -> None:
        self.done.append(("start", list(groups)))
        for group in groups:
            if group in self.failing:
                raise self.failing[group]
        self.urls = {**self.urls, **{group: f"http://{group}" for group in groups}}

    async def end(self, groups: Sequence[str]) -> None:
        if groups:
            self.done.append(("end", list(groups)))

    def engine_ended(self, group: str) -> None:
        self.done.append(("gone", [group]))

    async def update(self, config: CoordinatorConfig) -> None:
        self.done.append(("route", [one.group_id for one in config.engines if one.share > 0]))

    async def retire(self, group: str, drain_s: float) -> None:
        assert drain_s == 3.0
        self.done.append(("retire", [group]))


async def test_a_lost_group_ends_before_its_gpus_are_given_away() -> None:
    """Its supervisor would start it again beside its successor when its node returns."""
    base, carrier = plan(), Carrier(setting(long_answers()))
    lost, *serving = seats_of(base)
    successor = Seat("c9", "colocated", lost.stages)
    recorder = Recorder(base)
    chosen = candidate(carrier, tuple(serving), (*serving, successor), DEMAND)
    applier = Applier(cast(Coordinator, recorder), cast(Any, recorder), drain_s=3.0)
    await applier.apply(base, chosen, carrier, "a test", displaced=[lost.id])
    assert recorder.done[0] == ("end", [lost.id])
    assert ("start", ["c9"]) in recorder.done
    kind, groups = recorder.done[-1]
    assert kind == "route"
    assert "c9" in groups
    assert lost.id not in groups


@pytest.mark.parametrize(
    "error", [EngineFailed("c9", "does not start", (), Path("a.log")), RuntimeError("nobody thought of it")]
)
async def test_what_was_ended_while_nothing_served_is_started_again(error: Exception) -> None:
    """The coordinator hears at once that it is gone, so that it may come back at another address."""
    base, carrier = plan(), Carrier(setting(long_answers()))
    only = Seat("c0", "colocated", seats_of(base)[0].stages)
    base = plan_of(base, (only,), carrier.best((only,)), long_answers(), "one group")
    recorder = Recorder(base)
    recorder.failing = {"c9": error}
    chosen = candidate(carrier, (only,), (Seat("c9", "colocated", only.stages),), DEMAND)
    applier = Applier(cast(Coordinator, recorder), cast(Any, recorder), drain_s=3.0)
    with pytest.raises(ChangeFailed) as failed:
        await applier.apply(base, chosen, carrier, "a test")
    assert [group.id for group in failed.value.plan.groups] == ["c0"]
    expected = [("end", ["c0"]), ("gone", ["c0"]), ("start", ["c9"]), ("start", ["c0"]), ("route", ["c0"])]
    assert recorder.done == expected
