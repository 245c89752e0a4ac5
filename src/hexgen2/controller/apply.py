"""Putting a remedy into effect: traffic moves off, groups end and start, traffic moves on. Nothing is lost.

Requests go around what is to end before it ends; what it still has it may finish, and streams that take too
long are taken up by other engines.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Protocol

from hexgen2.controller.carry import Carrier, Seats
from hexgen2.controller.plans import plan_of
from hexgen2.controller.remedies import Candidate
from hexgen2.coordinator import Coordinator
from hexgen2.coordinator.engine import Engine
from hexgen2.deploy import EngineFailed, coordinator_config
from hexgen2.specs.errors import InputError
from hexgen2.specs.plan import Plan

log = logging.getLogger(__name__)


class Engines(Protocol):
    """Whoever runs the processes of a plan's groups."""

    @property
    def urls(self) -> Mapping[str, str]:
        """Where the groups that were started, and not ended since, answer."""
        ...

    async def start(self, plan: Plan, groups: Sequence[str]) -> None:
        """Start groups of the plan and return when they answer; EngineFailed or InputError where they do not.
        None of them is left after an error."""
        ...

    async def end(self, groups: Sequence[str]) -> None:
        """End groups, within a bounded time."""
        ...


class ChangeFailed(RuntimeError):
    """A change that did not come through; ``plan`` is what serves now."""

    def __init__(self, plan: Plan, cause: Exception) -> None:
        self.plan = plan
        super().__init__(str(cause))


class Applier:
    """Changes what a coordinator serves."""

    def __init__(self, coordinator: Coordinator, engines: Engines, drain_s: float) -> None:
        self._coordinator = coordinator
        self._engines = engines
        self._drain_s = drain_s

    async def apply(
        self,
        base: Plan,
        chosen: Candidate,
        carrier: Carrier,
        note: str,
        idle: Seats = (),
        displaced: Sequence[str] = (),
    ) -> Plan:
        """Go the candidate's way; the plan that serves then. ``base``: the plan that serves now; ``idle``:
        groups that are lost, to be watched for their return; ``displaced``: lost groups whose GPUs others get,
        so that they must not come back. ChangeFailed where a group does not start; what it was to replace has
        been started again then, if that could be."""
        lengths = carrier.setting.lengths
        final = plan_of(base, (*chosen.seats, *idle), chosen.carried, lengths, note)
        serving = base
        if displaced:
            await self._engines.end(displaced)
        for wave in chosen.waves:
            stops = [seat.id for seat in wave.stops]
            if wave.rps > 0:
                carried = carrier.best(wave.serving)
                serving = plan_of(base, (*wave.serving, *idle), carried, lengths, f"{note} (under way)")
                await self._route(serving)
                await self._retire(stops)
            else:
                log.warning("nothing serves while %s start", ", ".join(seat.id for seat in wave.starts))
            if stops:
                await self._engines.end(stops)
                for group in stops:  # where nothing serves meanwhile they were not retired
                    self._coordinator.engine_ended(group)
            try:
                if wave.starts:
                    await self._engines.start(final, [seat.id for seat in wave.starts])
            except Exception as error:  # whatever it is, the groups that were ended for it must come back
                if not isinstance(error, EngineFailed | InputError | OSError):
                    log.exception("a mistake, not an engine that does not start")
                again = (*wave.serving, *wave.stops)
                serving = await self._start_again(base, serving, again, stops, carrier, idle)
                raise ChangeFailed(serving, error) from error
        await self._route(final)
        await self._retire([group for group, engine in self._fleet.items() if engine.retired])
        return final

    @property
    def _fleet(self) -> Mapping[str, Engine]:
        return self._coordinator.fleet.engines

    async def _route(self, plan: Plan) -> None:
        names = self._coordinator.config.served_model_names
        await self._coordinator.update(coordinator_config(plan, self._engines.urls, names))

    async def _retire(self, groups: Sequence[str]) -> None:
        async with asyncio.TaskGroup() as tasks:
            for group in groups:
                tasks.create_task(self._coordinator.retire(group, self._drain_s))

    async def _start_again(
        self, base: Plan, serving: Plan, seats: Seats, ended: Sequence[str], carrier: Carrier, idle: Seats
    ) -> Plan:
        """What serves after a change broke off: also the groups that had been ended for it, if they start."""
        if not ended:
            return serving
        try:
            await self._engines.start(base, ended)
        except Exception as error:
            log.error("%s cannot be started again either: %s", ", ".join(ended), error)
            return serving
        note = "as before a change that failed"
        plan = plan_of(base, (*seats, *idle), carrier.best(seats), carrier.setting.lengths, note)
        await self._route(plan)
        return plan
