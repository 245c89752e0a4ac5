"""How many requests may be on their way to an engine, or run there, at once; what is beyond them is held back.

One rule for the coordinator and the simulator. Deterministic: what is noted decides.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from hexgen2.specs.routing import Path

PLACES_FACTOR = 1.2
"""Requests that may be on their way to an engine or run there, over those that it is meant to run at once. What
is above one keeps it fed while KV caches are sent; more of it only holds memory at the prefill engines, and
keeps the prompts of other decode engines from it."""
_NEW = 0.05
"""Weight of the last request in the mean times."""


def places(max_batch: int, factor: float = PLACES_FACTOR) -> int:
    """How many requests may be bound for an engine at once; the rest is held back before leg 1.

    >>> places(8), places(10, 1.0)
    (10, 10)
    """
    return math.ceil(max_batch * factor)


def prompts_at_most(paths: Iterable[Path], max_batch: Mapping[str, int]) -> dict[str, int]:
    """Prompts that prefill engines may compute at once for each engine that answers.

    A prefill engine runs up to ``max_batch``, for its targets in the proportion of its routes.

    >>> paths = [Path("p0", "d0", 0.3), Path("p0", "d1", 0.1), Path(None, "c0", 0.6)]
    >>> prompts_at_most(paths, {"p0": 8, "d0": 4, "d1": 4, "c0": 16})
    {'d0': 6, 'd1': 2}
    """
    routes = [path for path in paths if path.prefill is not None and path.share > 0]
    carried: dict[str | None, float] = {}
    for path in routes:
        carried[path.prefill] = carried.get(path.prefill, 0.0) + path.share
    found: dict[str, float] = {}
    for path in routes:
        assert path.prefill is not None
        part = max_batch[path.prefill] * path.share / carried[path.prefill]
        found[path.target] = found.get(path.target, 0.0) + part
    return {target: math.ceil(number - 1e-9) for target, number in found.items()}


class PromptsAhead:
    """Requests whose prompts may be under way for an engine beside its own `places`.

    Without them engines whose answers take no longer than their prompts would run dry: what waits for a prompt
    would fill the places of an engine that has nothing to do. With all that the prefill engines may run, quick
    prompts would pile up before slow answers, out of reach of the queue and its limits. By Little's law an
    engine that answers ``batch`` requests at once, each in D seconds, ends batch/D of them per second, and as
    many prompts per second, of F seconds each, feed it: ``batch * F / D``, and no more than ``most``.
    """

    def __init__(self) -> None:
        self.most = 0
        self._prompt_s = self._answer_s = 0.0  # mean times of the last requests; 0: not known

    def computed(self, seconds: float) -> None:
        """A prompt is done, so long after its request was let in."""
        self._prompt_s = _mean(self._prompt_s, seconds)

    def answered(self, seconds: float) -> None:
        """A request has ended, so long after its prompt was done."""
        self._answer_s = _mean(self._answer_s, seconds)

    def number(self, batch: int) -> int:
        """None before the first request has ended.

        >>> ahead = PromptsAhead()
        >>> ahead.most = 64
        >>> ahead.computed(0.5), ahead.number(16)
        (None, 0)
        >>> ahead.answered(2.0), ahead.number(16), ahead.number(1000)
        (None, 4, 64)
        """
        if not self._answer_s:
            return 0
        return min(self.most, math.ceil(batch * self._prompt_s / self._answer_s))


def _mean(before: float, last: float) -> float:
    return before + _NEW * (last - before) if before else last
