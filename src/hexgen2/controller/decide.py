"""The choice of a remedy: frozen values in, a decision with its reasons out. Pure.

A remedy must gain enough to be worth it, and the cheapest that nearly reaches the best is taken. A change of
load must be seen several times in a row, and after a change nothing is changed again for a while; engines that
come or go are answered at once. A change is on trial until it has settled, and taken back where the service
does worse.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from hexgen2.controller.assess import Assessment
from hexgen2.controller.observe import Observation
from hexgen2.controller.remedies import Candidate, Demand
from hexgen2.specs.plan import Plan, Role

Action = Literal["keep", "routes", "flip", "replan", "roll_back"]
Signature = frozenset[tuple[str, Role]]


@dataclass(frozen=True)
class Policy:
    """When to act. Times in seconds.

    ``min_gain``: part of the requests over ``horizon_s`` that a flip or a replan must add; ``min_route_gain``
    the same for new routes. ``sufficient``: part of the best remedy's requests that a cheaper one must reach to
    be taken instead. ``confirm``: observations in a row that must ask for a remedy. ``cooldown_s``: pause after
    a change. ``headroom``: part of the capacity that the demand may use before it counts as too much.
    ``restart_s``: from ending a group to its successor's first answer. ``min_serving``: part of what runs that
    must go on serving while groups are started. ``grace_s``: how long a group may be down before it is lost.
    ``settle_s``, ``settle_loss``: a change is judged after that time, and taken back where it serves this part
    less than before; its like is not tried again for ``refuse_s``. ``look_s``: pause between two looks at the
    remedies while none is worth it. ``drain_s``: how long a group that ends may go on with what it has.
    """

    horizon_s: float = 1800.0
    restart_s: float = 120.0
    min_gain: float = 0.05
    min_route_gain: float = 0.02
    sufficient: float = 0.95
    confirm: int = 3
    cooldown_s: float = 120.0
    headroom: float = 0.9
    min_serving: float = 0.5
    grace_s: float = 3.0
    settle_s: float = 60.0
    settle_loss: float = 0.05
    refuse_s: float = 3600.0
    look_s: float = 30.0
    drain_s: float = 30.0

    def demand(self, observed: Observation) -> Demand:
        """What is asked for, with the headroom; without bound where requests wait already."""
        rps = math.inf if observed.saturated else observed.arrival_rps / self.headroom
        return Demand(rps, self.horizon_s, self.restart_s)


@dataclass(frozen=True)
class Trial:
    """A change that has to prove itself: the plan before it and what that served, since when, what changed."""

    before: Plan
    before_rps: float
    before_saturated: bool
    since_s: float
    signature: Signature


@dataclass(frozen=True)
class Memory:
    """What the next decision must know of the last ones.

    ``wanted``, ``times``: the action that was asked for last, and how often in a row. ``routed``: the groups
    that were up when the routes were made last (None: those of the plan, before anything was observed).
    """

    wanted: Action = "keep"
    times: int = 0
    changed_s: float = -math.inf
    routed: frozenset[str] | None = None
    looked_s: float = -math.inf
    trial: Trial | None = None
    refused: tuple[tuple[Signature, float], ...] = ()

    def urgent(self, observed: Observation) -> bool:
        """Whether engines came or went since the routes were made."""
        return self.routed is not None and observed.fleet.up != self.routed


@dataclass(frozen=True)
class Decision:
    """What to do, and why: ``reasons`` in words, ``numbers`` behind them. ``candidate``: the remedy, where
    there is one; ``plan``: to go back to, for a roll-back."""

    action: Action
    reasons: tuple[str, ...]
    numbers: dict[str, Any]
    candidate: Candidate | None = None
    plan: Plan | None = None

    @property
    def text(self) -> str:
        """One line for the log."""
        return f"{self.action}: {'; '.join(self.reasons)}"

    def document(self) -> dict[str, Any]:
        """The decision as JSON."""
        chosen = self.candidate
        change = (
            {} if chosen is None else {"starts": chosen.starts, "stops": chosen.stops, "flips": chosen.flips}
        )
        return {"action": self.action, "reasons": self.reasons, **change, "numbers": self.numbers}


def needs_look(policy: Policy, memory: Memory, observed: Observation, now_rps: float) -> str | None:
    """Why the remedies are to be worked out now; None where all is well, or it was looked lately."""
    if memory.urgent(observed):
        return "engines came or went"
    if memory.wanted == "keep" and observed.at_s - memory.looked_s < policy.look_s:
        return None
    asked = policy.demand(observed).rps
    if asked > now_rps:
        return "requests wait" if math.isinf(asked) else f"{asked:.3g} requests/s are more than {now_rps:.3g}"
    return None


def judge(policy: Policy, memory: Memory, observed: Observation) -> tuple[Decision | None, Memory]:
    """The verdict on a change that is on trial: None where there is none or it is too early."""
    trial = memory.trial
    if trial is None or observed.at_s - trial.since_s < policy.settle_s:
        return None, memory
    now, before = observed.completed_rps, trial.before_rps
    numbers = {"before_rps": before, "after_rps": now}
    settled = replace(memory, trial=None)
    # Fewer requests than before tell nothing where fewer were asked for.
    comparable = trial.before_saturated and observed.saturated
    if comparable and now < before * (1 - policy.settle_loss):
        reasons = (f"{now:.4g} requests/s are served after the change, {before:.4g} were before it",)
        refused = (*memory.refused, (trial.signature, observed.at_s + policy.refuse_s))
        done = replace(settled, refused=refused, changed_s=observed.at_s, wanted="keep", times=0, routed=None)
        return Decision("roll_back", reasons, numbers, plan=trial.before), done
    return None, settled


def decide(policy: Policy, memory: Memory, observed: Observation, found: Assessment) -> tuple[Decision, Memory]:
    """The remedy to take now, if any. The memory is the one to hand to the next call; whoever takes the remedy
    tells so with `changed`."""
    demand, now_s = found.demand, observed.at_s
    memory = replace(memory, looked_s=now_s)
    urgent = memory.urgent(observed)
    allowed = [one for one in found.candidates if one.rps > 0 and not _refused(memory, one, now_s)]
    worthwhile = [one for one in allowed if _gain(found, one) >= _least(policy, one, urgent)]
    numbers = _numbers(found, observed)
    if not worthwhile:
        reason = f"no remedy adds enough to the {_served(found.now_served, demand)} that are served as it is"
        return Decision("keep", (reason,), numbers), replace(memory, wanted="keep", times=0)
    best = max(one.served for one in worthwhile)
    chosen = next(one for one in worthwhile if one.served >= policy.sufficient * best)
    reasons = _reasons(found, chosen, best, demand)
    if urgent:
        return Decision(chosen.remedy, ("engines came or went", *reasons), numbers, chosen), memory
    times = memory.times + 1 if memory.wanted == chosen.remedy else 1
    seen = replace(memory, wanted=chosen.remedy, times=times)
    wait = _wait(policy, memory, observed, chosen, times)
    if wait is not None:
        return Decision("keep", (*reasons, wait), numbers), seen
    return Decision(chosen.remedy, reasons, numbers, chosen), seen


def changed(
    memory: Memory, observed: Observation, before: Plan, chosen: Candidate, up: Iterable[str], now_s: float
) -> Memory:
    """The memory after a remedy was taken; ``up``: the groups that its routes were made for."""
    trial = Trial(before, observed.completed_rps, observed.saturated, now_s, signature_of(chosen))
    # New routes alone are on no trial: they are worked out anew with the next look. Nor is the answer to a
    # loss: what was served before it can be no measure, and more may have to be done soon.
    urgent = memory.urgent(observed)
    tried = chosen.remedy != "routes" and not urgent
    return replace(
        memory,
        wanted="keep",
        times=0,
        changed_s=memory.changed_s if urgent else now_s,
        looked_s=-math.inf,
        routed=frozenset(up),
        trial=trial if tried else None,
    )


def signature_of(chosen: Candidate) -> Signature:
    """What tells a change apart from others: the groups and their roles after it."""
    return frozenset((seat.id, seat.role) for seat in chosen.seats)


def _gain(found: Assessment, one: Candidate) -> float:
    """Part of the requests served as it is that a remedy adds (infinite where nothing is served)."""
    if found.now_served <= 0:
        return math.inf if one.served > 0 else 0.0
    return one.served / found.now_served - 1


def _least(policy: Policy, one: Candidate, urgent: bool) -> float:
    if one.remedy == "routes":
        # When engines come or go, the routes follow, be it only to use one that has come back.
        return -math.inf if urgent else policy.min_route_gain
    return policy.min_gain


def _wait(policy: Policy, memory: Memory, observed: Observation, chosen: Candidate, times: int) -> str | None:
    """Why a remedy is not taken yet."""
    if memory.trial is not None:
        return "the last change is still on trial"
    since = observed.at_s - memory.changed_s
    if since < policy.cooldown_s:
        return f"the last change is {since:.0f} s ago, {policy.cooldown_s:.0f} s must pass"
    if chosen.remedy != "routes" and not observed.steady:
        return "the load is still changing"
    if times < policy.confirm:
        return f"seen {times} of {policy.confirm} times"
    return None


def _refused(memory: Memory, one: Candidate, now_s: float) -> bool:
    mine = signature_of(one)
    return any(mine == known and now_s < until for known, until in memory.refused)


def _reasons(found: Assessment, chosen: Candidate, best: float, demand: Demand) -> tuple[str, ...]:
    gain = _gain(found, chosen)
    adds = "something where nothing is served" if math.isinf(gain) else f"{gain:+.1%} requests"
    told = [
        f"{found.now_rps:.4g} requests/s can be served now, {chosen.rps:.4g} then: "
        f"{adds} over {demand.horizon_s:.0f} s"
    ]
    if chosen.served < best:
        told.append(f"the best remedy would serve {best / chosen.served - 1:.1%} more, at a higher price")
    for what, names in (("roles of", chosen.flips), ("started:", chosen.starts), ("ended:", chosen.stops)):
        if names:
            told.append(f"{what} {', '.join(names)}")
    return tuple(told)


def _served(count: float, demand: Demand) -> str:
    return f"{count / demand.horizon_s:.4g} requests/s"


def _numbers(found: Assessment, observed: Observation) -> dict[str, Any]:
    inputs, outputs = observed.inputs, observed.outputs
    return {
        "arrival_rps": observed.arrival_rps,
        "completed_rps": observed.completed_rps,
        "saturated": observed.saturated,
        "queued": observed.fleet.queued,
        "mean_input_tokens": None if inputs is None else inputs.mean,
        "mean_output_tokens": None if outputs is None else outputs.mean,
        "down": sorted(group for group, seconds in observed.fleet.down_s.items() if seconds > 0),
        "now_rps": found.now_rps,
        "best_rps": found.best_rps,
        "assessed_in_s": found.wall_s,
        "candidates": [
            {
                "remedy": one.remedy,
                "rps": one.rps,
                "during_rps": [wave.rps for wave in one.waves],
                "gain": _gain(found, one),
                "starts": len(one.starts),
                "flips": len(one.flips),
            }
            for one in found.candidates
        ],
    }
