"""The first partition: GPUs into K groups of balanced memory with fast links inside.

The paper's way: the normalised Laplacian of the GPU graph (vertex weight = memory, edge weight = bandwidth),
recursive bisection along its second eigenvector, then Kernighan–Lin swaps that raise the bandwidth kept inside
groups while every group can still hold a replica.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
Bisection = Callable[[IntArray, float], tuple[IntArray, IntArray]]


def fiedler(weights: FloatArray) -> FloatArray:
    """(n,) the second eigenvector of the normalised Laplacian of a graph with edge weights (n, n).

    The sign is fixed by its largest entry. Where several vectors share the eigenvalue, as among equal links,
    LAPACK chooses one.
    """
    count = len(weights)
    if count <= 2:
        return np.arange(count, dtype=float)
    degrees = weights.sum(axis=1)
    scale = 1 / np.sqrt(np.maximum(degrees, np.finfo(float).tiny))
    laplacian = np.eye(count) - weights * scale[:, None] * scale[None, :]
    _, vectors = eigh(laplacian, subset_by_index=[1, 1])
    vector: FloatArray = vectors[:, 0] * scale
    largest = int(np.argmax(np.abs(np.round(vector / np.abs(vector).max(), 9))))
    return vector if vector[largest] >= 0 else -vector


def spectral_bisection(weights: FloatArray, memory: FloatArray) -> Bisection:
    """A function that cuts vertices into two along the Fiedler vector, at a given part of their memory."""

    def cut(vertices: IntArray, part: float) -> tuple[IntArray, IntArray]:
        vector = fiedler(weights[np.ix_(vertices, vertices)])
        order = vertices[np.lexsort((vertices, np.round(vector / max(np.abs(vector).max(), 1e-300), 9)))]
        return split_by_memory(order, memory, part)

    return cut


def split_by_memory(order: IntArray, memory: FloatArray, part: float) -> tuple[IntArray, IntArray]:
    """Cut an ordered run of vertices where the first piece has closest to ``part`` of the memory."""
    filled = np.cumsum(memory[order])
    at = int(np.argmin(np.abs(filled[:-1] - part * filled[-1]))) + 1
    return order[:at], order[at:]


def recursive(count: int, vertices: IntArray, cut: Bisection) -> list[IntArray]:
    """``count`` groups by halving: each half gets memory in proportion to the groups it will become."""
    if count <= 1 or len(vertices) <= 1:
        return [np.sort(vertices)]
    left = count // 2
    first, second = cut(vertices, left / count)
    # A half with fewer vertices than groups cannot be cut into them: the other half takes over the rest.
    left = min(max(left, count - len(second)), len(first))
    return recursive(left, first, cut) + recursive(count - left, second, cut)


def kernighan_lin(
    groups: Sequence[IntArray],
    weights: FloatArray,
    may: Callable[[IntArray], bool],
    passes: int = 8,
) -> list[IntArray]:
    """Swap pairs of vertices between groups while that raises the edge weight inside groups.

    ``may`` is the no-OOM condition: a swap stands only if both groups keep it (groups that broke it before may
    not get worse: they are left as they are). The best swap of each pair of groups is made first; ends when a
    pass finds none.
    """
    label = np.empty(len(weights), dtype=np.int64)
    for group, vertices in enumerate(groups):
        label[vertices] = group
    inside = weights.copy()
    np.fill_diagonal(inside, 0.0)
    for _ in range(passes):
        moved = False
        member = np.eye(len(groups))[label]
        pull = inside @ member  # (n, K): weight from each vertex into each group
        for a in range(len(groups)):
            for b in range(a):
                moved |= _best_swap(label, inside, pull, a, b, may)
        if not moved:
            break
    return [np.flatnonzero(label == group) for group in range(len(groups))]


def _best_swap(
    label: IntArray, inside: FloatArray, pull: FloatArray, a: int, b: int, may: Callable[[IntArray], bool]
) -> bool:
    first, second = np.flatnonzero(label == a), np.flatnonzero(label == b)
    if not len(first) or not len(second):
        return False
    gain = (
        (pull[first, b] - pull[first, a])[:, None]
        + (pull[second, a] - pull[second, b])[None, :]
        - 2 * inside[np.ix_(first, second)]
    )
    at = np.unravel_index(int(np.argmax(gain)), gain.shape)
    if gain[at] <= 1e-9 * inside.max():
        return False
    u, v = int(first[at[0]]), int(second[at[1]])
    label[u], label[v] = b, a
    if not (may(np.flatnonzero(label == a)) and may(np.flatnonzero(label == b))):
        label[u], label[v] = a, b
        return False
    for group, arrived, left in ((a, v, u), (b, u, v)):
        pull[:, group] += inside[:, arrived] - inside[:, left]
    return True
