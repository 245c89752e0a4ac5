"""From rows to the paper's figures of merit: ratios between systems, latency deadlines, prices that decide.

Everything here is a pure function of rows by key (see paper_measure).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from statistics import geometric_mean, mean
from typing import Any

from paper_cases import CHEAPER, CLASSES, HOMOGENEOUS, MIXED, MODELS, TRACE, WORLDS, Case, stored_world

Row = Mapping[str, Any]
Rows = Mapping[str, Row]
Pair = tuple[Case, Case]
HOMOGENEOUS_GPUS = 8


@dataclass(frozen=True)
class Spread:
    """Ratios over instances: how many, their mean, geometric mean, least and most."""

    runs: int
    mean: float
    geometric: float
    least: float
    most: float


def spread(values: Sequence[float]) -> Spread | None:
    """The spread of ratios; None where there are none."""
    if not values:
        return None
    return Spread(len(values), mean(values), geometric_mean(values), min(values), max(values))


def ratios(rows: Rows, pairs: Iterable[Pair], figure: str = "rps") -> list[float]:
    """The first case's figure over the second's, where both have one and the second's is not 0."""
    found = []
    for ours, other in pairs:
        mine, theirs = (figure_of(rows, case, figure) for case in (ours, other))
        if mine and theirs:
            found.append(mine / theirs)
    return found


def figure_of(rows: Rows, case: Case, figure: str = "rps") -> float | None:
    """A figure of the case's row; None where there is no row, or no plan."""
    row = rows.get(stored_world(case).key)
    return None if row is None else row.get(figure)


def against_distserve(
    system: str,
    world: str = "base",
    clusters: Sequence[str] = MIXED,
    loads: Sequence[str] = CLASSES,
    targets: tuple[float, float] | None = None,
) -> list[Pair]:
    """A system on mixed GPUs beside DistServe-like on the 8 H100, all instances."""
    return [
        (
            Case(system, cluster, model, load, world, targets),
            Case(WORLDS[world].baseline, HOMOGENEOUS, model, load, world, targets),
        )
        for cluster, model, load in product(clusters, MODELS, loads)
    ]


def against_hexgen(
    system: str,
    world: str = "base",
    clusters: Sequence[str] = (*MIXED, CHEAPER),
    targets: tuple[float, float] | None = None,
) -> list[Pair]:
    """A system beside HexGen-like on the same mixed GPUs, all instances."""
    first = [
        Case(system, cluster, model, load, world, targets)
        for cluster, model, load in product(clusters, MODELS, CLASSES)
    ]
    return [(case, replace(case, system="hexgen")) for case in first]


def between(first: str, second: str, cases: Iterable[Case]) -> list[Pair]:
    """Two systems on the same cases."""
    return [(replace(case, system=first), replace(case, system=second)) for case in cases]


def deadline_ratios(online: Rows, pairs: Iterable[tuple[str, str]]) -> list[float]:
    """The other's latency deadline over ours, for each pair of keys and each part of the requests.

    A deadline that a system never meets (null) has no ratio.
    """
    found = []
    for ours, other in pairs:
        if ours in online and other in online:
            both = zip(online[ours]["deadlines_s"], online[other]["deadlines_s"], strict=True)
            found += [theirs / mine for mine, theirs in both if mine and theirs]
    return found


def trace_pairs(
    system: str,
    other: str,
    world: str = "base",
    targets: tuple[float, float] | None = None,
    at: str = "common",
) -> list[tuple[str, str]]:
    """Keys of the online trace: a system on each mixed cluster beside another, planned for the same targets.

    ``other``: ``distserve`` stands for the world's DistServe-like on its 8 H100; any other is on the same GPUs.
    """
    found = []
    for cluster, model in product(MIXED, MODELS):
        ours = Case(system, cluster, model, TRACE, world, targets)
        theirs = replace(ours, system=other)
        if other == "distserve":
            theirs = replace(ours, system=WORLDS[world].baseline, cluster=HOMOGENEOUS)
        found.append((online_key(ours, at), online_key(theirs, at)))
    return found


def online_key(case: Case, at: str) -> str:
    """The key of a run at a rate: ``common`` to all systems of an instance, or the system's ``own``."""
    return f"{stored_world(case).key}@{at}"


@dataclass(frozen=True)
class Rental:
    """An instance at equal rates of spending: the ratio of requests/s as rented, and what the mixed side is.

    ``others``: USD per hour for its GPUs but the H100s, of which it has ``h100s``.
    """

    ratio: float
    others: float
    h100s: int

    def per_dollar(self, h100_price: float) -> float:
        """The ratio of requests per dollar when an H100 costs so much.

        Example: as many requests/s (ratio 1) from 2 H100 and $10 of others as from 8 H100, at $5 an hour: the
        8 cost $40, the others $20, so a dollar buys twice as many.
        """
        return self.ratio * HOMOGENEOUS_GPUS * h100_price / (self.others + self.h100s * h100_price)


def mean_per_dollar(rentals: Sequence[Rental], h100_price: float) -> float:
    """The mean over instances."""
    return mean(rental.per_dollar(h100_price) for rental in rentals)


def price_for(rentals: Sequence[Rental], wanted: float, most: float = 100.0) -> float | None:
    """The H100's price from which on the mean ratio per dollar is ``wanted``; None where none reaches it."""
    return lowest(lambda price: mean_per_dollar(rentals, price) >= wanted, most)


def lowest(holds: Callable[[float], bool], most: float, close: float = 1e-3) -> float | None:
    """The least number from which on something holds, within ``close``; None where not even at ``most``."""
    if not holds(most):
        return None
    low, high = 0.0, most
    while high - low > close:
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def rentals(rows: Rows, pairs: Iterable[Pair], h100_price: float) -> list[Rental]:
    """The pairs whose first side has a price, as rentals."""
    found = []
    for ours, other in pairs:
        mine, theirs = figure_of(rows, ours), figure_of(rows, other)
        if mine and theirs:
            row = rows[stored_world(ours).key]
            h100s = row["h100s"]
            found.append(Rental(mine / theirs, row["cluster_price"] - h100s * h100_price, h100s))
    return found
