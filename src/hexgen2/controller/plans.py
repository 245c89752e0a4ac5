"""Seats and their routes as a plan again, so that one kind of value is saved, compiled and shown."""

from __future__ import annotations

from collections import defaultdict

from hexgen2.controller.carry import Carried, Seat, Seats
from hexgen2.specs.plan import Bottleneck, Group, Objective, Plan, Route
from hexgen2.specs.workload import Lengths


def plan_of(base: Plan, seats: Seats, carried: Carried, lengths: Lengths, note: str) -> Plan:
    """The plan of these seats under the load of ``lengths``; ``base`` gives what does not change.

    Seats that ``carried`` does not know (their engines are lost) stay in the plan without a share. ValueError
    where nothing is carried: there is no plan of that.
    """
    if carried.rps <= 0:
        raise ValueError("these groups serve nothing")
    shares = carried.shares
    total = sum(shares.values())
    shares = {path: share / total for path, share in shares.items()}
    handled: dict[str, float] = defaultdict(float)
    for path, share in shares.items():
        for group in path:
            if group is not None:
                handled[group] += share
    return Plan(
        cluster=base.cluster,
        model=base.model,
        workload="observed",
        engine=base.engine,
        solver="controller",
        seed=base.seed,
        profiles=base.profiles,
        slo=base.slo,
        objective=Objective(name=base.objective.name, value=carried.rps, unit=base.objective.unit),
        throughput_rps=carried.rps,
        output_tokens_per_s=carried.rps * float(lengths.outputs.mean()),
        price_per_hour=sum(_price(base, seat) for seat in seats),
        wall_s=0.0,
        groups=tuple(_group(base, seat, carried, handled[seat.id]) for seat in seats),
        routes=tuple(
            Route.model_validate(
                {
                    "from": source,
                    "to": target,
                    "share": share,
                    "rps": share * carried.rps,
                    "capacity_rps": carried.route_limits.get((source, target), 0.0),
                }
            )
            for (source, target), share in shares.items()
            if source is not None
        ),
        bottleneck=Bottleneck(elements=carried.scarce, text=_limit(carried)),
        notes=(note,),
    )


def _group(base: Plan, seat: Seat, carried: Carried, share: float) -> Group:
    worth = carried.worths.get(seat.id)
    return Group(
        id=seat.id,
        role=seat.role,
        share=min(1.0, share),
        price_per_hour=_price(base, seat),
        capacity_rps=0.0 if worth is None else worth.rps,
        max_batch=worth.batch if worth is not None else seat.started_batch or 1,
        stages=seat.stages,
    )


def _price(base: Plan, seat: Seat) -> float:
    gpus = base.cluster.gpu_by_id
    return sum(base.cluster.gpu_price(gpus[gpu].node) for gpu in seat.gpus)


def _limit(carried: Carried) -> str:
    return f"{', '.join(carried.scarce)} at capacity" if carried.scarce else "the network between the groups"
