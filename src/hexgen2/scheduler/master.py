"""The master program: how many groups of each template, so that the phases and the network balance (HiGHS).

Maximise the requests/s that prefill and decode templates exchange, plus those of colocated ones. GPUs of each
kind of node are limited; so is, in the aggregate over all nodes of a kind, what its NICs and the links between
kinds carry. It sees neither single routes nor how groups pack into nodes: its answer is a start for the search,
and with optimistic rates for templates its relaxation is a bound (bound.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import coo_matrix, csr_matrix

from hexgen2.scheduler.columns import Column, Kinds

FloatArray = NDArray[np.float64]
Row = tuple[dict[int, float], float]
"""Variable → factor, and what their sum may be at most."""
ROUNDED = 1e-6
NEARLY_WHOLE = 0.75


@dataclass(frozen=True)
class Program:
    """min goal·x under matrix·x ≤ limits, x ≥ 0; the first ``columns`` variables count groups."""

    goal: FloatArray
    matrix: csr_matrix
    limits: FloatArray
    columns: int
    most: FloatArray
    scale: float


def program(kinds: Kinds, columns: Sequence[Column], kv_bytes: float) -> Program:
    """The master program. ``kv_bytes``: KV cache of a mean request.

    Variables: x_v groups of template v; u_v requests/s through it (prefill and decode templates); T_kl
    requests' worth of KV cache per second from kind k to kind l. Flows are in units of the largest rate.
    """
    scale = max((column.rps for column in columns), default=1.0)
    exchanging = [v for v, column in enumerate(columns) if column.role != "colocated"]
    flow = {v: len(columns) + at for at, v in enumerate(exchanging)}
    number = len(kinds.nodes)
    base = len(columns) + len(exchanging)
    total = base + number * number
    rows: list[Row] = []

    for kind in range(number):
        use = {v: float(sum(gpus for k, gpus in column.parts if k == kind)) for v, column in enumerate(columns)}
        room = float(len(kinds.nodes[kind]) * kinds.count(kind))
        rows.append(({v: gpus for v, gpus in use.items() if gpus}, room))
    rows += exchange_rows(columns, flow, base, number, scale)
    limit = np.full(total, np.inf)
    for kind in range(number):
        room = float(len(kinds.nodes[kind]) * kinds.count(kind))
        for v, column in enumerate(columns):
            gpus = sum(gpus for k, gpus in column.parts if k == kind)
            if gpus:
                limit[v] = min(limit[v], room // gpus)
    for a in range(number):
        for b in range(number):
            if a != b:
                carried = kinds.topology.bandwidth[np.ix_(kinds.nodes[a], kinds.nodes[b])].sum()
                limit[base + a * number + b] = carried / kv_bytes / scale
        nic = kinds.topology.cluster.nic_bandwidth(kinds.nodes[a][0]) * len(kinds.nodes[a])
        if np.isfinite(nic) and number > 1:
            others = [b for b in range(number) if b != a]
            rows.append(({base + a * number + b: 1.0 for b in others}, nic / kv_bytes / scale))
            rows.append(({base + b * number + a: 1.0 for b in others}, nic / kv_bytes / scale))

    goal = np.zeros(total)
    for v, column in enumerate(columns):
        if column.role == "colocated":
            goal[v] = -column.rps / scale
        elif column.role == "decode":
            goal[flow[v]] = -1.0
    matrix = row_matrix(rows, total)
    return Program(goal, matrix, np.array([bound for _, bound in rows]), len(columns), limit, scale)


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


def dive(master: Program) -> NDArray[np.int64]:
    """(columns,) whole numbers of groups of each template, good ones, by rounding the relaxation step by step.

    Whole parts are kept; of the rest all nearly whole ones, or the largest, are rounded up and the program is
    solved again. A rounding that leaves no solution is taken back and forbidden.
    """
    least, most = np.zeros(len(master.goal)), master.most.copy()
    counts = slice(0, master.columns)
    value = _relaxed(master, least, most)
    while value is not None:
        whole = np.floor(value[counts] + ROUNDED)
        part = value[counts] - whole
        least[counts] = np.maximum(least[counts], whole)
        if part.max(initial=0.0) <= ROUNDED:
            return whole.astype(np.int64)
        raised = part >= min(NEARLY_WHOLE, float(part.max()))
        trial = least.copy()
        trial[counts][raised] += 1
        after = _relaxed(master, trial, most) if np.all(trial <= most) else None
        if after is None and raised.sum() > 1:
            raised = np.arange(master.columns) == int(part.argmax())
            trial = least.copy()
            trial[counts][raised] += 1
            after = _relaxed(master, trial, most) if np.all(trial <= most) else None
        if after is None:
            most[counts][raised] = least[counts][raised]
            after = _relaxed(master, least, most)
        else:
            least = trial
        value = after
    return least[counts].astype(np.int64)


def relaxed_value(master: Program) -> float:
    """The relaxation's optimum in requests/s: no plan made of these templates serves more."""
    found = _relaxed(master, np.zeros(len(master.goal)), master.most)
    assert found is not None, "using no template at all is a solution"
    return -float(master.goal @ found) * master.scale


def _relaxed(master: Program, least: FloatArray, most: FloatArray) -> FloatArray | None:
    """The optimum with counts in a range and not necessarily whole; None when there is none."""
    solved = linprog(
        master.goal,
        A_ub=master.matrix,
        b_ub=master.limits,
        bounds=np.stack([least, most], axis=1),
        method="highs",
    )
    return None if solved.x is None else np.asarray(solved.x)
