"""Which path a request takes: the coordinator's rule, without its fleet.

Smooth weighted choice by the plan's shares, bent a bounded way by live load. Deterministic: the same calls
give the same choices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Path:
    """A way through the plan: prefill group (None: ``target`` does both), group that answers, share."""

    prefill: str | None
    target: str
    share: float

    @property
    def groups(self) -> tuple[str, ...]:
        return (self.target,) if self.prefill is None else (self.prefill, self.target)


def load_factor(load: float, mean: float, bound: float) -> float:
    """How a path's weight is multiplied: (1 + mean) / (1 + load), within [1 − bound, 1/(1 − bound)]."""
    floor = 1.0 - bound
    return min(max((1.0 + mean) / (1.0 + load), floor), 1.0 / floor)


class Router:
    """Smooth weighted round robin: a path earns its weight with each request; the richest is taken and pays
    one.

    ``bound`` (0 ≤ bound < 1) is how far load may bend a weight; 0 follows the shares alone.
    """

    def __init__(self, paths: Sequence[Path], bound: float = 0.5) -> None:
        self.paths = tuple(path for path in paths if path.share > 0)
        self._bound = bound
        self._credit = [0.0] * len(self.paths)
        self._groups = [path.groups for path in self.paths]

    def choose(self, load: Mapping[str, float]) -> Path:
        """The next request's path; ``load`` by group, a path as loaded as the more loaded of its groups."""
        loads = [max(load[group] for group in groups) for groups in self._groups]
        mean = sum(path.share * each for path, each in zip(self.paths, loads, strict=True))
        mean /= sum(path.share for path in self.paths)
        weights = [
            path.share * load_factor(each, mean, self._bound)
            for path, each in zip(self.paths, loads, strict=True)
        ]
        total = sum(weights)
        credit = self._credit
        best = 0
        for place, weight in enumerate(weights):
            credit[place] += weight / total
            if credit[place] > credit[best] + 1e-12:
                best = place
        credit[best] -= 1.0
        return self.paths[best]
