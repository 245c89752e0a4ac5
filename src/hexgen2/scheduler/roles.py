"""The secondary partition: which groups prefill and which decode.

Groups are coarsened to super-vertices joined by the bandwidth between them. They are split into two types so
that the phases are balanced against what the load asks of them and the weight BETWEEN the types, which is what
KV caches will cross, is large; projecting back gives every GPU of a group its role.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
ENUMERATED = 12
"""Groups up to which every split is looked at."""


def coarsen(weights: FloatArray, groups: Sequence[NDArray[np.int64]]) -> FloatArray:
    """(K, K) the edge weight between groups: the sum over pairs of their vertices, zero on the diagonal."""
    member = np.zeros((len(weights), len(groups)))
    for place, vertices in enumerate(groups):
        member[vertices, place] = 1.0
    between: FloatArray = member.T @ weights @ member
    np.fill_diagonal(between, 0.0)
    return between


def split(
    prefill: FloatArray, decode: FloatArray, between: FloatArray, balance: float = 0.95
) -> NDArray[np.bool_]:
    """(K,) True where a group shall prefill.

    ``prefill`` and ``decode`` (K,) are each group's capacity (requests/s) in either phase. Among the splits
    whose weaker phase reaches ``balance`` of the best split's, the one with the most weight between the types.
    With many groups the splits are those of a greedy start and the best single flips from it.
    """
    if len(prefill) <= ENUMERATED:
        candidates = np.array(list(product((False, True), repeat=len(prefill))))
        return _pick(candidates, prefill, decode, between, balance)
    chosen = _greedy(prefill, decode)
    while True:
        flips = np.vstack([chosen, chosen ^ np.eye(len(chosen), dtype=bool)])
        best = _pick(flips, prefill, decode, between, balance)
        if _merit(best, prefill, decode, between) <= _merit(chosen, prefill, decode, between):
            return chosen
        chosen = best


def weaker_phase(split: NDArray[np.bool_], prefill: FloatArray, decode: FloatArray) -> FloatArray:
    """The lesser of both phases' capacities, for splits (..., K)."""
    lesser: FloatArray = np.minimum(split @ prefill, ~split @ decode)
    return lesser


def _pick(
    candidates: NDArray[np.bool_], prefill: FloatArray, decode: FloatArray, between: FloatArray, balance: float
) -> NDArray[np.bool_]:
    weaker = weaker_phase(candidates, prefill, decode)
    near = candidates[weaker >= balance * weaker.max()]
    rows = near.astype(float)
    crossing = np.einsum("si,ij,sj->s", rows, between, 1 - rows)
    weaker = weaker_phase(near, prefill, decode)
    order = np.lexsort((-weaker, -np.round(crossing / max(crossing.max(), 1e-300), 9)))
    picked: NDArray[np.bool_] = near[order[0]]
    return picked


def _merit(
    split: NDArray[np.bool_], prefill: FloatArray, decode: FloatArray, between: FloatArray
) -> tuple[float, float]:
    row = split.astype(float)
    return float(weaker_phase(split, prefill, decode)), float(row @ between @ (1 - row))


def _greedy(prefill: FloatArray, decode: FloatArray) -> NDArray[np.bool_]:
    """Groups in the order of how much better they prefill than decode; the best cut of that order."""
    order = np.argsort(-(prefill + 1e-12) / (decode + 1e-12), kind="stable")
    as_prefill = np.concatenate([[0.0], np.cumsum(prefill[order])])
    as_decode = np.concatenate([np.cumsum(decode[order][::-1])[::-1], [0.0]])
    cut = int(np.argmax(np.minimum(as_prefill, as_decode)))
    chosen = np.zeros(len(prefill), dtype=bool)
    chosen[order[:cut]] = True
    return chosen
