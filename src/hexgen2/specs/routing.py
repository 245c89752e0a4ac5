"""Which path a request takes: smooth weighted choice by a plan's shares, bent a bounded way by live load and
by what engines have in their prefix caches.

One rule for the coordinator and the simulator. Pure and deterministic: the same calls give the same choices.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from hexgen2.specs.classes import ClassShares, RequestClass, RequestSize


@dataclass(frozen=True)
class Path:
    """A way through the fleet: the engine that computes the prompt (None: `target` does both) and the one
    that answers. Paths are equal when they lead the same way, whatever their shares.
    """

    prefill: str | None
    target: str
    share: float = field(compare=False)
    class_shares: ClassShares = field(default_factory=dict, compare=False)

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:  # paths are looked up several times for each request
        return hash((self.prefill, self.target))

    @cached_property
    def groups(self) -> tuple[str, ...]:
        return (self.target,) if self.prefill is None else (self.prefill, self.target)

    def __str__(self) -> str:
        return self.target if self.prefill is None else f"{self.prefill}->{self.target}"


def engine_load(placed: float, max_batch: float, kv_used: float = 0.0) -> float:
    """How much of an engine is taken, by whichever is scarcer: its slots (requests bound for it or running
    there over those that it is meant to run at once), or its KV cache's blocks (the part in use, 0 to 1).

    >>> engine_load(5, 10), engine_load(5, 10, 0.75)
    (0.5, 0.75)
    """
    return max(placed / max_batch, kv_used)


def load_factor(load: float, mean: float, bound: float) -> float:
    """How a path's weight is multiplied: above 1 where it is less loaded than the mean, below 1 where more.

    Loads are as `engine_load` counts them. The factor stays within [1 - bound, 1 / (1 - bound)].

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

    A caller may prefer some paths (their engines hold the prompt's prefix). The richest of them is then taken
    as long as that puts it at most ``slack`` requests ahead of its share; so a prefix that everybody shares
    spreads to as many engines as its traffic needs.
    """

    def __init__(self, paths: Sequence[Path], bound: float, slack: float = 0.0) -> None:
        self.paths = tuple(path for path in paths if path.share > 0)
        self._bound = bound
        self._slack = slack
        self._credit = [0.0] * len(self.paths)

    def choose(
        self,
        available: Callable[[Path], bool],
        load: Mapping[str, float],
        prefer: Container[Path] = (),
        up: Callable[[Path], bool] | None = None,
    ) -> Path | None:
        """The next request's path; None where none is available.

        A path that is not ``up`` (by default: not available) starts anew when it comes back. One that is up and
        not available for this request only, since its engine has no place, keeps what it has earned: else, with
        one place free at a time, the routes to an engine would not keep their proportions.

        `load` is by group; a path is as loaded as the more loaded of its engines. Groups that are not named
        count as idle.
        """
        candidates = [index for index, path in enumerate(self.paths) if available(path)]
        if not candidates:
            return None
        loads = [max([load.get(group, 0.0) for group in self.paths[index].groups]) for index in candidates]
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
        for index, weight in zip(candidates, weights, strict=True):
            # Credits are in shares of one request, so they stay bounded whatever the weights do from call
            # to call.
            self._credit[index] += weight / total
        best = self._richest(candidates)
        liked = [index for index in candidates if self.paths[index] in prefer] if prefer else []
        if liked and self._credit[richest := self._richest(liked)] >= 1.0 - self._slack:
            best = richest
        self._credit[best] -= 1.0
        if len(candidates) < len(self.paths):
            # A path that is out must not come back with a hoard (or a debt) from before.
            out = set(range(len(self.paths))).difference(candidates)
            for index in out:
                if up is None or not up(self.paths[index]):
                    self._credit[index] = 0.0
        return self.paths[best]

    def _richest(self, candidates: Sequence[int]) -> int:
        best = candidates[0]
        for index in candidates:
            if self._credit[index] > self._credit[best] + 1e-12:
                best = index
        return best


class ClassRouter:
    """Chooses by the shares of a request's class, or by those of all requests where there are no classes.

    Those of all requests count too for a request whose class is not known (its ``max_tokens`` is not named),
    for one that belongs to none, and for one none of whose class's paths is available: they are right for any
    mixture of requests that is like the whole.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        bound: float,
        classes: Sequence[RequestClass] = (),
        slack: float = 0.0,
    ) -> None:
        self.everything = SmoothRouter(paths, bound, slack)
        self._classes = tuple(classes)
        self._by_class = tuple(
            SmoothRouter(
                [replace(path, share=path.class_shares.get(one.name, 0.0)) for path in paths], bound, slack
            )
            for one in classes
        )
        used = set(self.everything.paths).union(*(router.paths for router in self._by_class))
        self.paths = tuple(path for path in paths if path in used)
        """Every path that some request may take, with its share of all requests."""

    def routers(self, size: RequestSize) -> tuple[SmoothRouter, ...]:
        """Whom to ask for a path of a request of this size, one after the other."""
        fitting = [place for place, one in enumerate(self._classes) if one.may_contain(size)]
        if len(fitting) != 1:
            return (self.everything,)
        return (self._by_class[fitting[0]], self.everything)

    def choose(
        self, available: Callable[[Path], bool], load: Mapping[str, float], size: RequestSize
    ) -> Path | None:
        """The path of the next request, which is of this size; None where none is available."""
        for router in self.routers(size):
            path = router.choose(available, load)
            if path is not None:
                return path
        return None
