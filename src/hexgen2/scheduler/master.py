"""The master program: how many groups of each template, so that the phases and the network balance (HiGHS).

Maximise the requests/s that prefill and decode templates exchange, plus those of colocated ones. GPUs of each
kind of node are limited; so is, in the aggregate over all nodes of a kind, what its NICs and the links between
kinds carry. It sees neither single routes nor how groups pack into nodes: its answer is a start for the search,
and with optimistic rates for templates its relaxation is a bound (bound.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, linprog, milp
from scipy.sparse import coo_matrix, csr_matrix

from hexgen2.scheduler.columns import Column, Kinds
from hexgen2.specs.plan import Role

FloatArray = NDArray[np.float64]
Row = tuple[dict[int, float], float]
"""Variable → factor, and what their sum may be at most."""
MIP_GAP = 0.005
NODE_LIMIT = 1
"""Branches looked at: almost all is found before the first one."""


@dataclass(frozen=True)
class Program:
    """min goal·x under matrix·x ≤ limits, 0 ≤ x ≤ most.

    The first ``columns`` variables count groups, ``flow[v]`` is the variable of the requests/s through template
    v (-1 for a colocated one), the first ``kinds`` rows limit GPUs. Flows are in units of ``scale`` requests/s.
    """

    goal: FloatArray
    matrix: csr_matrix
    limits: FloatArray
    most: FloatArray
    columns: int
    flow: NDArray[np.int64]
    kinds: int
    scale: float


def program(kinds: Kinds, columns: Sequence[Column], kv_bytes: float) -> Program:
    """The master program. ``kv_bytes``: KV cache of a mean request.

    Variables: x_v groups of template v; u_v requests/s through it (prefill and decode templates); T_kl
    requests' worth of KV cache per second from kind k to kind l, among the kinds that the templates use.
    """
    used = sorted({kind for column in columns for kind, _ in column.parts})
    columns = _renumbered(columns, {kind: place for place, kind in enumerate(used)})
    scale = max((column.rps for column in columns), default=1.0)
    exchanging = [v for v, column in enumerate(columns) if column.role != "colocated"]
    flow = {v: len(columns) + at for at, v in enumerate(exchanging)}
    number = len(used)
    base = len(columns) + len(exchanging)
    total = base + (number * number if exchanging else 0)

    room = [len(kinds.nodes[kind]) * kinds.count(kind) for kind in used]
    gpus: list[dict[int, float]] = [{} for _ in used]
    limit = np.full(total, np.inf)
    for v, column in enumerate(columns):
        for kind, taken in column.parts:
            gpus[kind][v] = gpus[kind].get(v, 0.0) + taken
        limit[v] = min(room[kind] // gpus[kind][v] for kind, _ in column.parts)
    rows: list[Row] = [(taken, float(most)) for taken, most in zip(gpus, room, strict=True)]
    if exchanging:
        rows += exchange_rows(columns, flow, base, number, scale)
        rows += _nic_rows(kinds, used, base, kv_bytes * scale)
        for a, b in permutations(range(number), 2):
            carried = kinds.topology.bandwidth[np.ix_(kinds.nodes[used[a]], kinds.nodes[used[b]])].sum()
            limit[base + a * number + b] = carried / kv_bytes / scale

    goal = np.zeros(total)
    for v, column in enumerate(columns):
        if column.role == "colocated":
            goal[v] = -column.rps / scale
        elif column.role == "decode":
            goal[flow[v]] = -1.0
    return Program(
        goal=goal,
        matrix=row_matrix(rows, total),
        limits=np.array([bound for _, bound in rows]),
        most=limit,
        columns=len(columns),
        flow=np.array([flow.get(v, -1) for v in range(len(columns))], dtype=np.int64),
        kinds=number,
        scale=scale,
    )


def _renumbered(columns: Sequence[Column], place: Mapping[int, int]) -> list[Column]:
    """The templates with other numbers for the kinds."""
    return [
        replace(
            column,
            parts=tuple((place[kind], gpus) for kind, gpus in column.parts),
            spread=tuple((place[kind], part) for kind, part in column.spread),
        )
        for column in columns
    ]


def _nic_rows(kinds: Kinds, used: Sequence[int], base: int, unit: float) -> list[Row]:
    """What the NICs of each kind's nodes carry to and from other kinds, in flows of ``unit`` bytes/s."""
    number = len(used)
    rows: list[Row] = []
    for a, kind in enumerate(used):
        nic = kinds.topology.cluster.nic_bandwidth(kinds.nodes[kind][0]) * len(kinds.nodes[kind])
        others = [b for b in range(number) if b != a]
        if np.isfinite(nic) and others:
            rows.append(({base + a * number + b: 1.0 for b in others}, nic / unit))
            rows.append(({base + b * number + a: 1.0 for b in others}, nic / unit))
    return rows


def exchange_rows(
    columns: Sequence[Column], flow: Mapping[int, int], base: int, kinds: int, scale: float
) -> list[Row]:
    """What templates exchange: within their rates, conserved at every kind, as much decoded as prefilled.

    ``flow``: template → its variable u_v; ``base``: the first of the variables T_kl, row by row.
    """
    rows: list[Row] = [({at: 1.0, v: -columns[v].rps / scale}, 0.0) for v, at in flow.items()]
    for kind in range(
        kinds
    ):  # what leaves a kind's prefill groups is sent, what its decode groups take arrives
        sent = {base + kind * kinds + other: -1.0 for other in range(kinds)}
        received = {base + other * kinds + kind: 1.0 for other in range(kinds)}
        for v, at in flow.items():
            part = dict(columns[v].spread).get(kind, 0.0)
            if part and columns[v].role == "prefill":
                sent[at] = part
            elif part:
                received[at] = -part
        rows.append((sent, 0.0))
        rows.append((received, 0.0))
    # So far: prefilled ≤ carried ≤ decoded. With decoded ≤ prefilled all three are equal.
    rows.append(({at: (-1.0 if columns[v].role == "prefill" else 1.0) for v, at in flow.items()}, 0.0))
    return rows


def row_matrix(rows: Sequence[Row], variables: int) -> csr_matrix:
    """(rows, variables) the factors of rows."""
    entries = [(row, at, value) for row, (terms, _) in enumerate(rows) for at, value in terms.items()]
    row_at, column_at, values = zip(*entries, strict=True)
    return coo_matrix((values, (row_at, column_at)), shape=(len(rows), variables)).tocsr()


def best_counts(master: Program, keep: int | None = None, above: float = 0.0) -> NDArray[np.int64] | None:
    """(columns,) whole numbers of groups of each template, within `MIP_GAP` of the best (HiGHS).

    ``keep``: only that many templates of either sort (colocated or not) are used, those that lose least at the
    relaxation's prices of GPUs and flows. ``above``: None unless more requests/s than that are found. The
    search for whole numbers ends after `NODE_LIMIT` branches, never by the clock.
    """
    relaxed = _relaxed(master) if above > 0 or keep is not None else None
    if above > 0 and relaxed is not None and _worth(master, relaxed) <= above * (1 + MIP_GAP):
        return None
    most = master.most.copy()
    if keep is not None and relaxed is not None:
        order = np.argsort(_losses(master, relaxed), kind="stable")
        for sort in (master.flow[order] < 0, master.flow[order] >= 0):
            most[order[sort][keep:]] = 0.0
    limits = [LinearConstraint(master.matrix, -np.inf, master.limits)]
    if above > 0:  # the solver gives up early where nothing better is left
        limits.append(LinearConstraint(master.goal[None, :], -np.inf, -above * (1 + MIP_GAP) / master.scale))
    counts = np.arange(len(master.goal)) < master.columns
    solved = milp(
        master.goal,
        constraints=limits,
        bounds=Bounds(0.0, most),
        integrality=counts.astype(np.int64),
        options={"mip_rel_gap": MIP_GAP, "node_limit": NODE_LIMIT},
    )
    if solved.x is None:
        return None
    found: NDArray[np.int64] = np.rint(solved.x[counts]).astype(np.int64)
    return found


def counted_value(columns: Sequence[Column], counts: NDArray[np.int64]) -> float:
    """Requests/s of whole numbers of groups if the network were free."""
    rates: dict[Role, float] = {"prefill": 0.0, "decode": 0.0, "colocated": 0.0}
    for column, count in zip(columns, counts, strict=True):
        rates[column.role] += column.rps * int(count)
    return min(rates["prefill"], rates["decode"]) + rates["colocated"]


def relaxed_value(master: Program) -> float:
    """The relaxation's optimum in requests/s: no plan made of these templates serves more."""
    return _worth(master, _relaxed(master))


def _worth(master: Program, relaxed: OptimizeResult) -> float:
    """The requests/s of the relaxation's optimum."""
    return -float(relaxed.fun) * master.scale


def _losses(master: Program, solved: OptimizeResult) -> FloatArray:
    """(columns,) the part of its GPUs' price that a template does not earn, at the relaxation's prices."""
    price = master.matrix[: master.kinds, : master.columns].T @ -solved.ineqlin.marginals[: master.kinds]
    reduced = np.asarray(solved.lower.marginals)
    loss = reduced[: master.columns].copy()
    exchanging = master.flow >= 0
    # -(factor of x_v) in the row u_v ≤ rate·x_v: what v loses, it loses as a group and by its flow.
    rate = -master.matrix[master.kinds : master.kinds + int(exchanging.sum()), : master.columns].sum(axis=0)
    loss[exchanging] += np.asarray(rate).ravel()[exchanging] * reduced[master.flow[exchanging]]
    ratio: FloatArray = loss / np.maximum(price, 1e-12)
    return ratio


def _relaxed(master: Program) -> OptimizeResult:
    """The optimum with counts that need not be whole."""
    bounds = np.stack([np.zeros(len(master.goal)), master.most], axis=1)
    solved = linprog(master.goal, A_ub=master.matrix, b_ub=master.limits, bounds=bounds, method="highs")
    assert solved.status == 0, f"the master program ended with: {solved.message}"
    return solved
