"""What can be done about a load that the plan does not suit, by rising cost, and what each remedy is worth.

Every remedy ends in seats (groups with roles) and the best routes over them. Its worth is the number of
requests that it serves over the horizon: less while groups are started anew, more afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from hexgen2.controller.carry import Carried, Carrier, Seat, Seats
from hexgen2.controller.rollout import Wave, rollout
from hexgen2.specs.plan import ROLES, Role

Remedy = Literal["routes", "flip", "replan"]
MayFlip = Callable[[Seat, Role], bool]
"""Whether the engine of a seat can take a role without being started anew."""

MOST_FLIPS = 12
"""Flips in a row that are looked at."""
LEAST_GAIN = 0.005
"""Part of the rate that one more flip must add."""


@dataclass(frozen=True)
class Demand:
    """What is asked for: requests/s (infinite: more than anything serves), looked at ``horizon_s`` ahead.
    ``restart_s``: from ending a group to its successor's first answer."""

    rps: float
    horizon_s: float
    restart_s: float

    def served(self, after_rps: float, during_rps: Sequence[float] = ()) -> float:
        """Requests served over the horizon when groups are started in waves, one ``restart_s`` each.

        >>> Demand(rps=10, horizon_s=100, restart_s=20).served(after_rps=15, during_rps=[4])
        880.0
        """
        left, total = self.horizon_s, 0.0
        for rps in during_rps:
            span = min(self.restart_s, left)
            total += min(self.rps, rps) * span
            left -= span
        return total + min(self.rps, after_rps) * left


@dataclass(frozen=True)
class Candidate:
    """A remedy worked out: the seats after it, what they carry, and the waves in which groups are started.

    ``flips``: groups whose role changes in place; ``starts``, ``stops``: groups that are started and ended.
    ``served``: requests over the horizon.
    """

    remedy: Remedy
    seats: Seats
    carried: Carried
    waves: tuple[Wave, ...]
    flips: tuple[str, ...]
    starts: tuple[str, ...]
    stops: tuple[str, ...]
    served: float

    @property
    def rps(self) -> float:
        return self.carried.rps

    @property
    def cost(self) -> tuple[int, int, int]:
        """Remedies sort by it, the cheapest first: groups started, then ended, then flipped."""
        return (len(self.starts), len(self.stops), len(self.flips))


def starts(old: Seats, new: Seats) -> int:
    """Groups to be started on the way from seats that run to others."""
    known = {seat.id for seat in old}
    return sum(seat.id not in known for seat in new)


def flipped(old: Seats, new: Seats) -> int:
    """Groups that change their role in place."""
    before = {seat.id: seat.role for seat in old}
    return sum(before.get(seat.id, seat.role) != seat.role for seat in new)


def candidate(carrier: Carrier, old: Seats, new: Seats, demand: Demand, min_serving: float = 0.5) -> Candidate:
    """The way from seats that run to others, and its worth."""
    before = {seat.id: seat for seat in old}
    after = {seat.id for seat in new}
    carried = carrier.best(new)
    waves = rollout(carrier, old, new, min_serving)
    turned = tuple(seat.id for seat in new if seat.id in before and before[seat.id].role != seat.role)
    return Candidate(
        remedy="replan" if waves else "flip" if turned else "routes",
        seats=new,
        carried=carried,
        waves=waves,
        flips=turned,
        starts=tuple(seat.id for seat in new if seat.id not in before),
        stops=tuple(seat.id for seat in old if seat.id not in after),
        served=demand.served(carried.rps, [wave.rps for wave in waves if wave.starts]),
    )


def flips(carrier: Carrier, seats: Seats, may_flip: MayFlip, demand_rps: float) -> Iterator[Seats]:
    """One flip, two flips, …: each time the one that raises the rate most, while that adds anything and the
    demand is not met."""
    current, carried = seats, carrier.best(seats)
    done: set[str] = set()
    for _ in range(MOST_FLIPS):
        if carried.rps >= demand_rps:
            return
        choices = [
            (carrier.ceiling(changed), seat.id, changed)
            for seat, changed in _single_flips(current, may_flip)
            if seat.id not in done
        ]
        # What the groups carry without a network is cheap and bounds the rate: the exact rate is asked for
        # until no bound beats the best.
        choices.sort(key=lambda choice: -choice[0])
        best, best_id, best_seats = carried, None, current
        for ceiling, name, changed in choices:
            if ceiling <= best.rps * (1 + LEAST_GAIN):
                break
            found = carrier.best(changed)
            if found.rps > best.rps * (1 + LEAST_GAIN):
                best, best_id, best_seats = found, name, changed
        if best_id is None:
            return
        done.add(best_id)
        current, carried = best_seats, best
        yield current


def _single_flips(seats: Seats, may_flip: MayFlip) -> Iterator[tuple[Seat, Seats]]:
    for place, seat in enumerate(seats):
        for role in ROLES:
            if role != seat.role and may_flip(seat, role):
                yield seat, (*seats[:place], seat.as_role(role), *seats[place + 1 :])
