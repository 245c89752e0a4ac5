"""The program that gives every request class its own shares of the routes (HiGHS)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_matrix, csr_matrix, hstack

from hexgen2.specs.workload import FloatArray


@dataclass(frozen=True)
class Way:
    """A path: group numbers (``prefill`` None for a colocated group), and seconds of each network resource per
    prompt token. ``prompts``: how much more of the prefill group's queue a request takes on this route."""

    prefill: int | None
    target: int
    per_token: tuple[tuple[Hashable, float], ...] = ()
    prompts: float = 1.0


def solve(seconds: FloatArray, ways: Sequence[Way], parts: FloatArray, tokens: FloatArray) -> FloatArray | None:
    """Rates by class and way (C, W) at the largest total, the load then spread; None where there is no
    solution.

    ``seconds`` (G, C) per request of each group, ``tokens`` (C,) of a prompt, both in one unit of time.
    """
    classes, count = len(parts), len(ways)
    usable = np.array(
        [[bool(np.isfinite(way_seconds(way, seconds, c)).all()) for way in ways] for c in range(classes)]
    )
    rows: dict[Hashable, list[tuple[int, float]]] = {}
    for c in range(classes):
        for w, way in enumerate(ways):
            if not usable[c, w]:
                continue
            column = c * count + w
            for group, used in zip(way_groups(way), way_seconds(way, seconds, c), strict=True):
                rows.setdefault(("group", group), []).append((column, float(used)))
            for name, per_token in way.per_token:
                rows.setdefault(name, []).append((column, per_token * float(tokens[c])))
    variables = classes * count
    matrix = _matrix(list(rows.values()), variables)
    share = _matrix([[(c * count + w, 1.0) for w in range(count)] for c in range(classes)], variables)
    total = csr_matrix(-parts[:, None])
    bounds = [(0.0, None if usable[v // count, v % count] else 0.0) for v in range(variables)]
    most = linprog(
        np.append(np.zeros(variables), -1.0),
        A_ub=_beside(matrix, csr_matrix((len(rows), 1))),
        b_ub=np.ones(len(rows)),
        A_eq=_beside(share, total),
        b_eq=np.zeros(classes),
        bounds=[*bounds, (0.0, None)],
        method="highs",
    )
    if most.status != 0 or most.x[-1] <= 0:
        return None
    value = float(most.x[-1]) * (1 - 1e-6)
    # The same total with every group's load as low as the fullest of them allows.
    is_group = np.array([isinstance(name, tuple) and name[0] == "group" for name in rows])
    even = linprog(
        np.append(np.zeros(variables), 1.0),
        A_ub=_beside(matrix, csr_matrix(-is_group.astype(float)[:, None])),
        b_ub=1.0 - is_group,
        A_eq=_beside(share, csr_matrix((classes, 1))),
        b_eq=value * parts,
        bounds=[*bounds, (0.0, None)],
        method="highs",
    )
    solved = even.x if even.status == 0 else most.x
    rates: FloatArray = np.maximum(solved[:-1], 0.0).reshape(classes, count)
    return rates


def way_groups(way: Way) -> tuple[int, ...]:
    return (way.target,) if way.prefill is None else (way.prefill, way.target)


def way_seconds(way: Way, seconds: FloatArray, c: int) -> FloatArray:
    """Seconds of each of `way_groups` that a request of a class takes."""
    if way.prefill is None:
        return seconds[way.target, c : c + 1]
    return np.array([seconds[way.prefill, c] * way.prompts, seconds[way.target, c]])


def _matrix(rows: Sequence[Sequence[tuple[int, float]]], columns: int) -> csr_matrix:
    entries = [(row, column, value) for row, terms in enumerate(rows) for column, value in terms]
    at, columns_at, values = zip(*entries, strict=True) if entries else ((), (), ())
    return coo_matrix((values, (at, columns_at)), shape=(len(rows), columns)).tocsr()


def _beside(left: csr_matrix, right: csr_matrix) -> csr_matrix:
    return hstack([left, right], format="csr")
