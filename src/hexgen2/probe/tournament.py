"""Who measures a link with whom and when: every pair once, and nobody in two pairs at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def rounds(players: Sequence[T]) -> list[list[tuple[T, T]]]:
    """All pairs in as few rounds of disjoint pairs as there can be: one less than there are players, or as many
    as there are where that is an odd number (one of them pauses in each).

    The circle method: one stays, the others go round.

    >>> rounds("abcd")
    [[('a', 'd'), ('b', 'c')], [('a', 'c'), ('d', 'b')], [('a', 'b'), ('c', 'd')]]
    """
    ring: list[T | None] = [*players, *([None] if len(players) % 2 else [])]
    found = []
    for _ in range(len(ring) - 1):
        half = len(ring) // 2
        pairs = zip(ring[:half], reversed(ring[half:]), strict=True)
        found.append([(a, b) for a, b in pairs if a is not None and b is not None])
        ring = [ring[0], ring[-1], *ring[1:-1]]
    return found
