"""From groups that run to others, in waves, so that something serves all the time where that is possible."""

from __future__ import annotations

from dataclasses import dataclass

import networkx as nx

from hexgen2.controller.carry import Carrier, Seat, Seats


@dataclass(frozen=True)
class Unit:
    """Groups that must end before others can start, since they share GPUs; either side may be empty."""

    stops: Seats
    starts: Seats


@dataclass(frozen=True)
class Wave:
    """Groups that end and start together, the groups that serve meanwhile, and what these carry."""

    stops: Seats
    starts: Seats
    serving: Seats
    rps: float


def units(old: Seats, new: Seats) -> tuple[Unit, ...]:
    """The changes between two sets of seats, cut into parts that do not touch each other's GPUs."""
    before, after = {seat.id for seat in old}, {seat.id for seat in new}
    ends = [seat for seat in old if seat.id not in after]
    begins = [seat for seat in new if seat.id not in before]
    graph = nx.Graph()
    graph.add_nodes_from(seat.id for seat in (*ends, *begins))
    graph.add_edges_from((end.id, begin.id) for end in ends for begin in begins if end.gpus & begin.gpus)
    return tuple(
        Unit(
            stops=tuple(seat for seat in ends if seat.id in part),
            starts=tuple(seat for seat in begins if seat.id in part),
        )
        for part in nx.connected_components(graph)
    )


def rollout(carrier: Carrier, old: Seats, new: Seats, min_serving: float = 0.5) -> tuple[Wave, ...]:
    """Waves that together lead from ``old`` to ``new``; none where no group starts or ends.

    A wave ends as many groups as leave ``min_serving`` of what runs now, the dearest last; at least one unit.
    What only ends (nothing takes its GPUs) ends in a last wave that starts nothing.
    """
    changes = units(old, new)
    waiting = [unit for unit in changes if unit.starts]
    only_ends = tuple(seat for unit in changes if not unit.starts for seat in unit.stops)
    serving = _better_roles(carrier, old, new)
    floor = min_serving * carrier.best(old).rps
    waves: list[Wave] = []
    while waiting:
        chosen: list[Unit] = []
        left, rps = serving, carrier.best(serving).rps
        for unit in sorted(waiting, key=lambda unit: -carrier.best(_minus(left, unit.stops)).rps):
            fewer = _minus(left, unit.stops)
            carries = carrier.best(fewer).rps
            if chosen and carries < floor:
                continue
            chosen.append(unit)
            left, rps = fewer, carries
        if rps <= 0:  # nothing serves meanwhile anyhow: then for as short as possible
            chosen, left = waiting, _minus(serving, tuple(s for unit in waiting for s in unit.stops))
        starts = tuple(seat for unit in chosen for seat in unit.starts)
        waiting = [unit for unit in waiting if unit not in chosen]
        stops = tuple(seat for unit in chosen for seat in unit.stops)
        waves.append(Wave(stops, starts, left, carrier.best(left).rps))
        serving = (*left, *starts)
    if only_ends:
        left = _minus(serving, only_ends)
        waves.append(Wave(only_ends, (), left, carrier.best(left).rps))
    return tuple(waves)


def _better_roles(carrier: Carrier, old: Seats, new: Seats) -> Seats:
    """What runs now, with the groups that stay in their old or in their new roles: whichever carries more."""
    after = {seat.id: seat for seat in new}
    flipped = tuple(after.get(seat.id, seat) for seat in old)
    return flipped if carrier.best(flipped).rps >= carrier.best(old).rps else old


def _minus(seats: Seats, gone: tuple[Seat, ...]) -> Seats:
    names = {seat.id for seat in gone}
    return tuple(seat for seat in seats if seat.id not in names)
