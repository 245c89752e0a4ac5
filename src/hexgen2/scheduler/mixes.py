"""Which nodes to rent: a mixed-integer program over node counts and group templates (HiGHS).

Variables: n_k nodes of offer k and x_v groups of template v, whole numbers; u_v requests/s through prefill and
decode templates; T_kl requests' worth of KV cache per second from nodes of offer k to nodes of offer l. Groups
use no more GPUs than are rented; what crosses stays within the NICs of the rented nodes and the links between
them. Those grow with n_k·n_l, which is not linear: they are held to its envelope, at most n_k times the links
of one node to all nodes of l that can be had, and the same from the other side. So the program never counts
less than the network carries. Like the master program it sees no single routes and no packing of groups into
nodes: its rate is an estimate, which the planner then replaces by a plan.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp

from hexgen2.scheduler.columns import Column
from hexgen2.scheduler.master import Row, exchange_rows, row_matrix
from hexgen2.specs.cluster import GBPS
from hexgen2.specs.offers import Mix, Offers
from hexgen2.specs.plan import Role

FloatArray = NDArray[np.float64]
MIP_GAP = 2e-3
"""Part of the optimum at which the program may stop: far below what the planner's own result varies by."""
LEAST_PRICE = 1e-6
"""USD per hour that a GPU counts as when the price is minimised, beside its own price."""
NODE_LIMIT = 2000
"""Branches looked at: a limit in seconds would make the answer depend on the machine."""


@dataclass(frozen=True)
class Wanted:
    """What a mix must keep: ``hourly`` USD per hour at most, ``rate`` requests/s at least, ``gpus`` at most.

    ``most``: nodes of each offer at most (the market's where None); ``roles``: only groups in these. With a
    rate the price is minimised, else the rate is maximised. ``gap``: part of the optimum at which to stop.
    """

    hourly: float | None = None
    rate: float | None = None
    gpus: int | None = None
    most: Mix | None = None
    roles: frozenset[Role] | None = None
    gap: float = MIP_GAP


@dataclass(frozen=True)
class Estimate:
    """A mix and what the program expects of it: requests/s, USD per hour.

    ``bound``: by the program no mix has a higher rate (asked for a price), or a lower price (for a rate).
    """

    mix: Mix
    rps: float
    price: float
    bound: float


@dataclass(frozen=True)
class Market:
    """Offers, the templates of groups on them, and the nodes of each that are looked at.

    Kind k of a template's parts is offer k. ``kv_bytes``: KV cache of a mean request.
    """

    offers: Offers
    columns: tuple[Column, ...]
    kv_bytes: float
    most: Mix

    def best(self, wanted: Wanted) -> Estimate | None:
        """The best mix that keeps what is wanted; None when there is none (or none that serves at all)."""
        if not self.columns:
            return None
        rows, offers = [*self._rows], self.offers.offers
        prices = dict(enumerate(offer.node_price for offer in offers))
        served = dict.fromkeys(self._served, -1.0)
        served.update({at: -rate for at, rate in self._colocated.items()})
        if wanted.hourly is not None:
            rows.append((prices, wanted.hourly))
        if wanted.gpus is not None:
            rows.append(({k: float(o.count) for k, o in enumerate(offers)}, float(wanted.gpus)))
        if wanted.rate is not None:
            rows.append((served, -wanted.rate / self._scale))
        goal = np.zeros(self._variables)
        if wanted.rate is not None:
            # Of equally cheap mixes the smallest: own hardware costs nothing.
            goal[list(prices)] = [
                p + LEAST_PRICE * o.count for p, o in zip(prices.values(), offers, strict=True)
            ]
        else:
            goal[list(served)] = list(served.values())
            # Of equal rates the cheapest mix: no node is rented that serves nothing.
            dearest = sum(price * most for price, most in zip(prices.values(), self.most, strict=True))
            goal[list(prices)] = [MIP_GAP * price / max(dearest, 1e-300) for price in prices.values()]
        found = milp(
            goal,
            constraints=LinearConstraint(row_matrix(rows, self._variables), ub=[limit for _, limit in rows]),
            bounds=Bounds(0.0, self._upper(wanted)),
            integrality=self._whole,
            options={"mip_rel_gap": wanted.gap, "node_limit": NODE_LIMIT},
        )
        if found.x is None:
            return None
        mix = tuple(round(count) for count in found.x[: len(self.most)])
        bound = float(found.mip_dual_bound)
        if wanted.rate is not None:  # what all of the mix serves, not only the rate that was asked
            bound = max(0.0, bound - LEAST_PRICE * self.offers.gpus(self.most))
            whole = self.best(Wanted(most=mix, roles=wanted.roles))
            return None if whole is None else replace(whole, mix=mix, price=self.offers.price(mix), bound=bound)
        rps = -sum(factor * float(found.x[at]) for at, factor in served.items()) * self._scale
        if rps <= 0 or not any(mix):
            return None
        # The prices took at most MIP_GAP from the goal.
        return Estimate(mix, rps, self.offers.price(mix), (MIP_GAP - bound) * self._scale)

    @cached_property
    def least_rate(self) -> float:
        """Requests/s that any group serves, and that is not lost in the solver's tolerance."""
        return max(min(column.rps for column in self.columns) / 2, 1e-4 * self._scale) if self.columns else 1.0

    @cached_property
    def _scale(self) -> float:
        """Requests/s in one unit of the flows."""
        return max(column.rps for column in self.columns)

    @cached_property
    def _flow(self) -> dict[int, int]:
        """Template → its variable u_v."""
        start = len(self.most) + len(self.columns)
        exchanging = [v for v, column in enumerate(self.columns) if column.role != "colocated"]
        return {v: start + at for at, v in enumerate(exchanging)}

    @property
    def _base(self) -> int:
        """The first of the variables T_kl."""
        return len(self.most) + len(self.columns) + len(self._flow)

    @property
    def _variables(self) -> int:
        return self._base + len(self.most) ** 2

    @property
    def _served(self) -> list[int]:
        return [at for v, at in self._flow.items() if self.columns[v].role == "decode"]

    @property
    def _colocated(self) -> dict[int, float]:
        """Variable x_v of colocated templates → their rate."""
        start = len(self.most)
        return {start + v: c.rps / self._scale for v, c in enumerate(self.columns) if c.role == "colocated"}

    @cached_property
    def _whole(self) -> NDArray[np.int64]:
        whole = np.zeros(self._variables, dtype=np.int64)
        whole[: len(self.most) + len(self.columns)] = 1
        return whole

    @cached_property
    def _rows(self) -> list[Row]:
        """What every mix keeps."""
        number = len(self.most)
        rows: list[Row] = []
        for kind, offer in enumerate(self.offers.offers):
            use = {number + v: float(_gpus_of(column, kind)) for v, column in enumerate(self.columns)}
            rows.append(({kind: -float(offer.count), **{at: gpus for at, gpus in use.items() if gpus}}, 0.0))
        # The exchange is written with the templates' variables first; here those of the nodes precede them.
        flow = {v: at - number for v, at in self._flow.items()}
        for terms, limit in exchange_rows(self.columns, flow, self._base - number, number, self._scale):
            rows.append(({number + at: factor for at, factor in terms.items()}, limit))
        return rows + self._network()

    def _network(self) -> list[Row]:
        number = len(self.most)
        unit = self.kv_bytes * self._scale
        rows: list[Row] = []
        for a, offer in enumerate(self.offers.offers):
            others = [b for b in range(number) if b != a]
            for b in others:
                figures = self.offers.figures(a, b)
                assert figures is not None, "checked by parse_offers"
                carried = figures.gbps * GBPS / unit
                between = self._base + a * number + b
                rows.append(({between: 1.0, a: -carried * self.most[b]}, 0.0))
                rows.append(({between: 1.0, b: -carried * self.most[a]}, 0.0))
            if offer.nic_gbps is not None and others:
                nic = -offer.nic_gbps * GBPS / unit
                rows.append(({**{self._base + a * number + b: 1.0 for b in others}, a: nic}, 0.0))
                rows.append(({**{self._base + b * number + a: 1.0 for b in others}, a: nic}, 0.0))
        return rows

    def _upper(self, wanted: Wanted) -> FloatArray:
        number = len(self.most)
        upper = np.full(self._variables, np.inf)
        upper[:number] = self.most if wanted.most is None else wanted.most
        for v, column in enumerate(self.columns):
            fits = [upper[kind] * self.offers.offers[kind].count // gpus for kind, gpus in column.parts]
            allowed = wanted.roles is None or column.role in wanted.roles
            upper[number + v] = min(fits) if allowed else 0
        return upper


def _gpus_of(column: Column, kind: int) -> int:
    return sum(gpus for found, gpus in column.parts if found == kind)
