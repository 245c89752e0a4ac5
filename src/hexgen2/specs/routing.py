"""Which path a request takes: smooth weighted choice by a plan's shares, bent a bounded way by live load.

One rule for the coordinator and the simulator. Pure and deterministic: the same calls give the same choices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Path:
    """A way through the fleet: the engine that computes the prompt (None: `target` does both) and the one
    that answers.
    """

    prefill: str | None
    target: str
    share: float

    @property
    def groups(self) -> tuple[str, ...]:
        return (self.target,) if self.prefill is None else (self.prefill, self.target)

    def __str__(self) -> str:
        return self.target if self.prefill is None else f"{self.prefill}->{self.target}"


def load_factor(load: float, mean: float, bound: float) -> float:
    """How a path's weight is multiplied: above 1 where it is less loaded than the mean, below 1 where more.

    Loads are requests in flight over the requests that the plan lets run at once. The factor stays within
    [1 - bound, 1 / (1 - bound)].

    >>> load_factor(0.5, 0.5, 0.5), load_factor(3.0, 0.5, 0.5), load_factor(0.0, 9.0, 0.5)
    (1.0, 0.5, 2.0)
    """
    floor = 1.0 - bound
    return min(max((1.0 + mean) / (1.0 + load), floor), 1.0 / floor)


class SmoothRouter:
    """Smooth weighted round robin: each path earns its weight per request, the richest is taken and pays
    the total.

    Over any run of requests a path's count stays within a constant of its share of them, without bursts.
    Weights of paths that are not available are spread over the others in proportion.
    """

    def __init__(self, paths: Sequence[Path], bound: float) -> None:
        self.paths = tuple(path for path in paths if path.share > 0)
        self._bound = bound
        self._credit = [0.0] * len(self.paths)

    def choose(self, available: Callable[[Path], bool], load: Mapping[str, float]) -> Path | None:
        """The next request's path; None where none is available.

        `load` is by group; a path is as loaded as the more loaded of its engines. Groups that are not named
        count as idle.
        """
        candidates = [index for index, path in enumerate(self.paths) if available(path)]
        if not candidates:
            return None
        loads = [max(load.get(group, 0.0) for group in self.paths[index].groups) for index in candidates]
        total_share = sum(self.paths[index].share for index in candidates)
        mean = (
            sum(self.paths[index].share * load_ for index, load_ in zip(candidates, loads, strict=True))
            / total_share
        )
        weights = [
            self.paths[index].share * load_factor(load_, mean, self._bound)
            for index, load_ in zip(candidates, loads, strict=True)
        ]
        total = sum(weights)
        best = candidates[0]
        for index, weight in zip(candidates, weights, strict=True):
            # Credits are in shares of one request, so they stay bounded whatever the weights do from call
            # to call.
            self._credit[index] += weight / total
            if self._credit[index] > self._credit[best] + 1e-12:
                best = index
        self._credit[best] -= 1.0
        if len(candidates) < len(self.paths):
            # A path that is out must not come back with a hoard (or a debt) from before.
            out = set(range(len(self.paths))).difference(candidates)
            for index in out:
                self._credit[index] = 0.0
        return self.paths[best]
