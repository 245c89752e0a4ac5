"""The loop: observe, work out the remedies, decide, apply; every decision is told with its numbers."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from prometheus_client import Counter, Gauge

from hexgen2.controller.apply import Applier, ChangeFailed, Engines
from hexgen2.controller.assess import Assessment, Flipping, Task, assess
from hexgen2.controller.carry import Carrier, Seats, Setting, live, seats_of, shares_of
from hexgen2.controller.decide import Decision, Memory, Policy, changed, decide, judge, needs_look, signature_of
from hexgen2.controller.nodes import lost_groups, lost_nodes, usable_gpus
from hexgen2.controller.observe import Finished, FleetState, KvReceived, Observation, Window
from hexgen2.controller.process import OtherProcess
from hexgen2.controller.remedies import Candidate, Demand, candidate
from hexgen2.controller.replan import Effort
from hexgen2.coordinator import Coordinator, Served, kv_transfer_totals
from hexgen2.coordinator.engine import Engine
from hexgen2.coordinator.watches import going_on
from hexgen2.cost import CostModel
from hexgen2.scheduler import EngineProfile
from hexgen2.specs.plan import Plan
from hexgen2.specs.workload import Lengths

log = logging.getLogger(__name__)

Mode = Literal["dry-run", "on"]
Work = Callable[[Task], Awaitable[Assessment]]
_BARELY_S = 1e-3  # an engine that has just gone down is down


@dataclass(frozen=True)
class Watching:
    """How the controller looks: an observation every ``interval_s``, of the last ``window_s`` seconds, judged
    from ``at_least`` answered requests on; and what a search for plans may take."""

    interval_s: float = 2.0
    window_s: float = 60.0
    at_least: int = 50
    effort: Effort = field(default_factory=Effort)


class Controller:
    """Watches a coordinator that serves a plan, and changes the plan where that pays.

    ``planned``: the requests that the plan was made for, until others were seen. ``flipping``: which engines
    can take another role in place, for the groups of a plan. ``restarts``: whether groups can be started and
    ended at all. ``alive``: nodes that the launcher knows to live or to be gone. ``returning``: groups that are
    being started again by somebody else.
    """

    def __init__(
        self,
        plan: Plan,
        planned: Lengths,
        cost: CostModel,
        profile: EngineProfile,
        coordinator: Coordinator,
        engines: Engines,
        *,
        mode: Mode = "dry-run",
        restarts: bool = True,
        policy: Policy | None = None,
        watching: Watching | None = None,
        flipping: Callable[[Plan], Flipping] = lambda _: Flipping(),
        tell: Callable[[Decision], None] = lambda _: None,
        work: Work | None = None,
        alive: Callable[[], Mapping[str, bool]] = dict,
        returning: Callable[[], Collection[str]] = tuple,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.plan = plan
        self.policy = policy or Policy()
        self._lengths = planned  # as seen last
        self._cost = cost
        self._profile = profile
        self._coordinator = coordinator
        self._mode = mode
        self._restarts = restarts
        self._watching = watching or Watching()
        self._flipping = flipping
        self._tell = tell
        self._work: Work = work or OtherProcess(assess)
        self._alive = alive
        self._returning = returning
        self._clock = clock
        self._applier = Applier(coordinator, engines, self.policy.drain_s)
        self._window = Window(self._watching.window_s, clock(), self._watching.at_least)
        self._memory = Memory(routed=frozenset(plan.group_by_id))
        self._started = {group.id: group.max_batch for group in plan.groups}
        coordinator.metrics.listener = self
        registry = coordinator.metrics.registry
        self._changes = Counter(
            "hexgen2:plan_changes", "Changes of the plan while serving", ("action",), registry=registry
        )
        self._now_rps = Gauge(
            "hexgen2:plan_capacity_rps",
            "Requests/s that the plan can carry under the load seen last, by the cost model",
            registry=registry,
        )
        self._best_rps = Gauge(
            "hexgen2:best_plan_rps",
            "The same of the best plan found, when it was last looked",
            registry=registry,
        )

    # What the coordinator tells

    def arrived(self) -> None:
        self._window.arrived(self._clock())

    def served(self, request: Served) -> None:
        self._window.finished(Finished(self._clock(), request.prompt_tokens, request.output_tokens))

    # The loop

    async def run(self) -> None:
        """Watch until cancelled. A mistake in one round is logged, and the next one comes."""
        try:
            while True:
                await asyncio.sleep(self._watching.interval_s)
                with going_on("controller"):  # and the plan stays as it is
                    await self.step()
        finally:
            if isinstance(self._work, OtherProcess):
                self._work.close()

    async def step(self) -> Decision | None:
        """One round; what was decided, None where there was nothing to decide."""
        observed = await self.observe()
        verdict, self._memory = judge(self.policy, self._memory, observed)
        carrier = Carrier(self._setting(observed))
        if verdict is not None:
            self._tell(verdict)
            assert verdict.plan is not None, "there is a plan to go back to"
            back = candidate(carrier, self._up(observed), seats_of(verdict.plan), self._demand(observed))
            await self._apply(back, carrier, verdict.text)
            self._memory = replace(self._memory, routed=frozenset(self.plan.group_by_id))
            return verdict
        now_rps = carrier.with_shares(self._up(observed), shares_of(self.plan))
        self._now_rps.set(now_rps)
        if needs_look(self.policy, self._memory, observed, now_rps) is None:
            return None
        found = await self._assess(observed)
        self._best_rps.set(found.best_rps)
        decision, self._memory = decide(self.policy, self._memory, observed, found)
        self._tell(decision)
        if decision.candidate is None:
            return decision
        before, chosen = self.plan, decision.candidate
        known = self._memory
        if self._mode == "dry-run":
            self._memory = changed(known, observed, before, chosen, observed.fleet.up, self._clock())
            self._memory = replace(self._memory, trial=None)
        elif await self._apply(chosen, carrier, decision.text):
            groups = [seat.id for seat in chosen.seats]
            self._memory = changed(known, observed, before, chosen, groups, self._clock())
        return decision

    async def observe(self) -> Observation:
        """The load and the engines now."""
        urls = {group: engine.endpoint.url for group, engine in self._engines.items() if engine.up}
        totals = await kv_transfer_totals(urls, timeout_s=1.0)
        now = self._clock()
        self._window.received(
            now, {group: KvReceived(one.bytes, one.transfers, one.seconds) for group, one in totals.items()}
        )
        observed = self._window.observe(now, self._fleet_state())
        self._lengths = observed.lengths or self._lengths
        return observed

    # Parts of a round

    @property
    def _engines(self) -> Mapping[str, Engine]:
        return self._coordinator.fleet.engines

    def _down_s(self) -> dict[str, float]:
        """Seconds that each group of the plan has been down."""
        now = time.monotonic()
        return {
            group: 0.0 if engine.up else max(engine.down_for(now), _BARELY_S)
            for group, engine in self._engines.items()
            if group in self.plan.group_by_id
        }

    def _fleet_state(self) -> FleetState:
        """The engines; a group counts as down once it has been for longer than the grace."""
        answering = [
            engine
            for engine in self._engines.values()
            if engine.up and not engine.retired and engine.endpoint.role != "prefill" and engine.endpoint.share
        ]
        batch = sum(engine.batch for engine in answering)
        return FleetState(
            down_s={
                group: 0.0 if seconds <= self.policy.grace_s else seconds
                for group, seconds in self._down_s().items()
            },
            busy=sum(engine.placed for engine in answering) / batch if batch else 0.0,
            queued=self._coordinator.admission.waiting,
        )

    def _setting(self, observed: Observation) -> Setting:
        slo = self.plan.slo.tpot_s if self.plan.objective.name == "goodput" else None
        return Setting(self.plan.cluster, self._cost, self._profile, self._lengths, slo, observed.links)

    def _up(self, observed: Observation) -> Seats:
        return live(seats_of(self.plan, self._started), observed.fleet.up)

    def _demand(self, observed: Observation) -> Demand:
        return self.policy.demand(observed)

    async def _assess(self, observed: Observation) -> Assessment:
        """The remedies. What starts nothing is worked out at once where engines came or went: a search would
        take seconds, and is left for later unless nothing serves without it."""
        seats = seats_of(self.plan, self._started)
        lost = lost_groups(self._down_s(), self.policy.grace_s, self._returning())
        gone = lost_nodes(seats, lost, self._alive())
        task = Task(
            setting=self._setting(observed),
            seats=seats,
            shares=shares_of(self.plan),
            up=observed.fleet.up,
            usable=usable_gpus(self.plan.cluster, seats, lost, gone),
            demand=self._demand(observed),
            flipping=self._flipping(self.plan),
            effort=self._watching.effort,
            min_serving=self.policy.min_serving,
            search=self._restarts,
            taken=frozenset(self._started),
        )
        if self._memory.urgent(observed):
            quick = await asyncio.to_thread(assess, replace(task, search=False))
            if quick.best_rps > 0 or not lost or not self._restarts:
                return quick
        return await self._work(task)

    async def _apply(self, chosen: Candidate, carrier: Carrier, note: str) -> bool:
        """Put a remedy into effect; whether that worked out."""
        names = {seat.id for seat in chosen.seats} | set(chosen.stops)
        taken = {gpu for seat in chosen.seats for gpu in seat.gpus}
        lost = tuple(seat for seat in seats_of(self.plan, self._started) if seat.id not in names)
        idle = tuple(seat for seat in lost if not seat.gpus & taken)
        displaced = [seat.id for seat in lost if seat.gpus & taken]
        try:
            self.plan = await self._applier.apply(self.plan, chosen, carrier, note, idle, displaced)
        except ChangeFailed as failure:
            log.error("the change failed: %s", failure)
            self.plan = failure.plan
            until = (signature_of(chosen), self._clock() + self.policy.refuse_s)
            self._memory = replace(
                self._memory,
                refused=(*self._memory.refused, until),
                routed=frozenset(self.plan.group_by_id),
                changed_s=self._clock(),
            )
            return False
        finally:
            self._window.forget(self._clock())
        self._changes.labels(chosen.remedy).inc()
        for group in chosen.starts:
            self._started[group] = self.plan.group_by_id[group].max_batch
        return True
