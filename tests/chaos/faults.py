"""What goes wrong and when: an endless schedule of kills and freezes, the same for the same seed. Pure."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["kill", "freeze"]
_KINDS: tuple[Kind, ...] = ("kill", "freeze")


@dataclass(frozen=True)
class Outage:
    """At `at_s` an engine is killed (SIGKILL) or frozen (SIGSTOP); `for_s` later it is started or thawed."""

    at_s: float
    group: str
    kind: Kind
    for_s: float


@dataclass(frozen=True)
class FaultRates:
    """How hard a fleet is hit. Times between faults and of outages are drawn evenly from the ranges, in
    seconds; `out_at_once` is the part of each role's engines that may be out together, at least one. A killed
    engine counts as out until `restart_s` after it was started again.
    """

    between_s: tuple[float, float] = (0.2, 0.6)
    killed_s: tuple[float, float] = (0.5, 2.0)
    frozen_s: tuple[float, float] = (0.3, 4.0)
    restart_s: float = 0.0
    out_at_once: float = 0.4


def outages(seed: int, roles: Mapping[str, str], rates: FaultRates) -> Iterator[Outage]:
    """Outages in order of time without end; an engine that is out is left alone until it is back.

    Every engine falls in turn (those hit least come first), so a long enough run hits all of them; of each two
    outages one is a kill and one a freeze.
    """
    draw = random.Random(seed)
    groups = sorted(roles)
    hits = dict.fromkeys(groups, 0)
    back_at = dict.fromkeys(groups, 0.0)
    now = 0.0
    kinds: list[Kind] = []
    while True:
        now += draw.uniform(*rates.between_s)
        candidates = []
        for group in groups:
            peers = [peer for peer in groups if roles[peer] == roles[group]]
            out = sum(back_at[peer] > now for peer in peers)
            if back_at[group] <= now and out < max(1, int(rates.out_at_once * len(peers))):
                candidates.append(group)
        if not candidates:
            continue
        fewest = min(hits[group] for group in candidates)
        group = draw.choice([group for group in candidates if hits[group] == fewest])
        kinds = kinds or draw.sample(_KINDS, 2)
        kind = kinds.pop()
        for_s = draw.uniform(*(rates.killed_s if kind == "kill" else rates.frozen_s))
        hits[group] += 1
        back_at[group] = now + for_s + (rates.restart_s if kind == "kill" else 0.0)
        yield Outage(now, group, kind, for_s)
