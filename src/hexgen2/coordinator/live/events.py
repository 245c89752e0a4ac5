"""What happens, as it happens: failures, restarts, streams that go on elsewhere, changes of plan and roles.

Found by comparing one reading with the next; the last ones are kept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from hexgen2.coordinator.config import CoordinatorConfig, Role
from hexgen2.coordinator.live.reading import Reading
from hexgen2.specs.plan import Plan

MOST = 200
MERGE_S = 10.0
"""Events of one kind that follow each other within this time are told as one."""
MOST_NAMED = 3
MOVED = 0.005
"""Change of a route's share that is worth a word."""

Kind = Literal[
    "down", "up", "restart", "failure", "retry", "migration", "broken", "refused", "roles", "routes", "plan"
]
DOES: Mapping[Role, str] = {"prefill": "prefills", "decode": "decodes", "colocated": "does both phases"}


@dataclass(frozen=True, slots=True)
class Event:
    """``seq``: the sample at which it was told last; ``at`` and ``since``: times of day of its last and first
    happening; ``count``: how many requests or streams, where it is about some."""

    id: int
    seq: int
    since: float
    at: float
    kind: Kind
    group: str
    text: str
    count: int = 0


@dataclass(frozen=True)
class Told:
    """An event that was found: ``text`` may have `{count}` in it."""

    kind: Kind
    text: str
    group: str = ""
    count: int = 0


class EventLog:
    """The last events."""

    def __init__(self) -> None:
        self._events: deque[tuple[Event, str]] = deque(maxlen=MOST)
        self._next = 1

    def add(self, told: Told, seq: int, at: float) -> None:
        """Write an event down, together with the last of its kind where that was just now."""
        if told.count:
            for place in range(len(self._events) - 1, -1, -1):
                event, pattern = self._events[place]
                if at - event.at > MERGE_S:
                    break
                if (event.kind, event.group, pattern) == (told.kind, told.group, told.text):
                    count = event.count + told.count
                    text = _counted(pattern, count)
                    self._events[place] = replace(event, seq=seq, at=at, count=count, text=text), pattern
                    return
        text = _counted(told.text, told.count)
        self._events.append(
            (Event(self._next, seq, at, at, told.kind, told.group, text, told.count), told.text)
        )
        self._next += 1

    def since(self, seq: int) -> list[Event]:
        """Events told after a sample, oldest first."""
        return [event for event, _ in self._events if event.seq > seq]


def _counted(pattern: str, count: int) -> str:
    """A text with its number; 'request(s)' becomes one or several."""
    return pattern.replace("{count}", str(count)).replace("(s)", "" if count == 1 else "s")


def changes(
    before: Reading, now: Reading, reasons: Mapping[str, str], lives: Mapping[str, int]
) -> Iterator[Told]:
    """What happened between two readings. ``reasons``: why each engine is down; ``lives``: how often it has
    gone down since the reading before."""
    for group, up in now.up.items():
        was = before.up.get(group)
        if was and not up:
            yield Told("down", f"{group} is down: {reasons.get(group) or 'no answer'}", group)
        elif up and was is False:
            yield Told("up", f"{group} is up", group)
        elif up and was and lives.get(group):
            yield Told("down", f"{group} was down for less than a second", group)
    for group, count in now.restarts.items():
        if count > before.restarts.get(group, 0.0):
            yield Told("restart", f"{group} is being started again", group)
    for (group, kind), count in now.failed.items():
        if new := round(count - before.failed.get((group, kind), 0.0)):
            yield Told(
                "failure", f"{{count}} request(s) failed on {group} ({kind.replace('_', ' ')})", group, new
            )
    if new := round(now.retries - before.retries):
        yield Told("retry", "{count} request(s) tried again on another route", count=new)
    if new := round(now.migrations - before.migrations):
        yield Told("migration", "{count} stream(s) went on on another engine", count=new)
    for reason, count in now.broken.items():
        if new := round(count - before.broken.get(reason, 0.0)):
            yield Told("broken", f"{{count}} stream(s) broken off ({reason.replace('_', ' ')})", count=new)
    if new := round(now.refused - before.refused):
        yield Told("refused", "{count} request(s) refused: more than can be served", count=new)


def node_changes(before: Collection[str], now: Collection[str]) -> Iterator[Told]:
    """Nodes that went dark or came back, from the dark ones of before and of now."""
    for node in sorted(set(now).difference(before)):
        yield Told("down", f"node {node} is lost: none of its groups answers")
    for node in sorted(set(before).difference(now)):
        yield Told("up", f"node {node} is back")


def groups_by_node(plan: Plan) -> dict[str, frozenset[str]]:
    """The groups that have GPUs on each node of a plan."""
    found: dict[str, set[str]] = {}
    for group in plan.groups:
        for gpu in group.gpus:
            found.setdefault(gpu.rsplit("/", 1)[0], set()).add(group.id)
    return {node: frozenset(groups) for node, groups in found.items()}


def dark_nodes(groups: Mapping[str, frozenset[str]], up: Mapping[str, bool]) -> frozenset[str]:
    """Nodes of which no group answers; groups that nobody has asked about yet are not counted as lost."""
    return frozenset(node for node, names in groups.items() if not any(up.get(name, True) for name in names))


def turns(before: CoordinatorConfig, now: CoordinatorConfig) -> Iterator[Told]:
    """What another config changes: groups that come or go, roles, shares of routes."""
    roles_before = {engine.group_id: engine.role for engine in before.engines}
    roles_now = {engine.group_id: engine.role for engine in now.engines}
    if new := [group for group in roles_now if group not in roles_before]:
        yield Told("plan", f"{', '.join(new)} {'is' if len(new) == 1 else 'are'} part of the plan now")
    if gone := [group for group in roles_before if group not in roles_now]:
        yield Told(
            "plan", f"{', '.join(gone)} {'is' if len(gone) == 1 else 'are'} not part of the plan any more"
        )
    for group, role in roles_now.items():
        was = roles_before.get(group)
        if was is not None and was != role:
            yield Told("roles", f"{group} {DOES[role]} now; before, it {_did(was)}", group)
    moved = _moved(_shares(before), _shares(now))
    if moved:
        words = [f"{name} {old:.0%} → {new:.0%}" for name, old, new in moved[:MOST_NAMED]]
        rest = f" and {len(moved) - MOST_NAMED} more" if len(moved) > MOST_NAMED else ""
        yield Told("routes", f"new shares: {', '.join(words)}{rest}")


def _did(role: Role) -> str:
    return {"prefill": "prefilled", "decode": "decoded", "colocated": "did both"}[role]


def _shares(config: CoordinatorConfig) -> dict[str, float]:
    shares = {f"{route.prefill} → {route.decode}": route.share for route in config.routes}
    return shares | {e.group_id: e.share for e in config.engines if e.role == "colocated"}


def _moved(before: Mapping[str, float], now: Mapping[str, float]) -> list[tuple[str, float, float]]:
    """(route, share before, share now) of what changed, the largest changes first."""
    found = [(name, before.get(name, 0.0), now.get(name, 0.0)) for name in {**before, **now}]
    found = [one for one in found if abs(one[2] - one[1]) >= MOVED]
    return sorted(found, key=lambda one: -abs(one[2] - one[1]))
