"""`serve --replan`: the controller beside a running service, its decisions shown and written down."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from typing_extensions import override

from hexgen2.cli.planning import problem_of
from hexgen2.controller import BOTH, Controller, Decision, Engines, Flipping, Mode, Policy
from hexgen2.coordinator import Coordinator
from hexgen2.deploy import Deployment
from hexgen2.specs.errors import InputError
from hexgen2.specs.finite import finite
from hexgen2.specs.plan import Plan

if TYPE_CHECKING:
    from rich.console import Console

LEAST_RESTART_S = 5.0


class FixedEngines(Engines):
    """Engines that nobody can start or end singly."""

    def __init__(self, deployment: Deployment) -> None:
        self._urls = {engine.group_id: engine.url for engine in deployment.coordinator.engines}

    @property
    def urls(self) -> Mapping[str, str]:
        return self._urls

    @override
    async def start(self, plan: Plan, groups: Sequence[str]) -> None:
        raise InputError("--replan", "", f"{', '.join(groups)} cannot be started here", "serve real engines")

    async def end(self, groups: Sequence[str]) -> None:
        raise AssertionError(f"{', '.join(groups)} cannot be ended")


def controller_for(
    plan: Plan,
    coordinator: Coordinator,
    engines: Engines,
    *,
    mode: Mode,
    in_place: bool,
    started_in_s: float,
    run_directory: Path,
    returning: Callable[[], Collection[str]],
    alive: Callable[[], Mapping[str, bool]],
    console: Console,
) -> Controller:
    """The controller of a service that runs. ``in_place``: its engines can change between prefill and decode;
    ``started_in_s``: what their start took; ``alive``: the nodes that are known to live or to be gone.
    InputError where the plan's workload or profiles cannot be read."""
    journal = run_directory / "decisions.jsonl"

    def tell(decision: Decision) -> None:
        with journal.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite(decision.document()), allow_nan=False) + "\n")
        if decision.action != "keep":
            told = f"{'would ' if mode == 'dry-run' else ''}{decision.text}"
            console.print(told, style="bold", markup=False)
            coordinator.live.tell(told)

    def flipping(of: Plan) -> Flipping:
        return Flipping({group.id: BOTH for group in of.groups if in_place and group.role in BOTH})

    problem = problem_of(plan)
    return Controller(
        plan,
        problem.lengths,
        problem.cost,
        problem.engine,
        coordinator,
        engines,
        mode=mode,
        policy=Policy(restart_s=max(LEAST_RESTART_S, started_in_s)),
        restarts=not isinstance(engines, FixedEngines),
        flipping=flipping,
        tell=tell,
        returning=returning,
        alive=alive,
    )
