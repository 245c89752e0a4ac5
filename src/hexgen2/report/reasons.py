"""Why a plan is as it is, in words: what limits it, runners-up, what engine rules cost, what more would add."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from hexgen2.report.terminal import headed
from hexgen2.report.words import alike, ids_words, runs_words
from hexgen2.specs.plan import ROLES, Group, Plan, Role, RunnerUp, ShadowPrice

FULL = 0.995
"""Load from which a group counts as full."""
UNLIKE = 5e-4
"""Part of the objective below which two plans count as equally good."""
MOST_PRICES = 6
"""Shadow prices shown to a person; the plan file has all."""


def explanation(plan: Plan) -> dict[str, list[str]]:
    """Sentences by subject: limits, choices, rules, more."""
    return {
        "limits": limit_lines(plan),
        "choices": choice_lines(plan),
        "rules": rule_lines(plan),
        "more": more_lines(plan),
    }


def print_explanation(console: Console, plan: Plan) -> None:
    """The explanation for a terminal."""
    titles = {
        "limits": "What limits it",
        "choices": "Why these roles and layouts",
        "rules": "What the engine's rules cost",
        "more": "What more would add",
    }
    for subject, lines in explanation(plan).items():
        if lines:
            console.print()
            console.print(headed(titles[subject]))
            for line in lines:
                console.print(f"    {line}", markup=False)


def limit_lines(plan: Plan) -> list[str]:
    """The minimum cut in words: what is full, what has room, how busy the network is."""
    lines = [f"{plan.bottleneck.text}: the plan serves more only if that is relieved."]
    totals = {role: sum(group.capacity_rps for group in plan.role_groups(role)) for role in ROLES}
    carried = sum(route.rps for route in plan.routes)
    pairs: tuple[tuple[Role, Role], ...] = (("prefill", "decode"), ("decode", "prefill"))
    for role, other in pairs:
        if carried and totals[role] > carried / FULL:
            why = "" if load(plan, plan.role_groups(other)) < FULL else f" while {other} is full"
            lines.append(f"The {role} groups could serve {totals[role] / carried - 1:.0%} more{why}.")
    if plan.links:
        busiest = plan.links[0]
        full = [f"{link.source} → {link.target}" for link in plan.links if link.use >= FULL]
        if full:
            lines.append(f"Links that KV caches fill: {', '.join(full)}.")
        else:
            lines.append(
                f"No link is full; the busiest, {busiest.source} → {busiest.target}, carries "
                f"{rate_words(busiest.bytes_per_s)}, {busiest.use:.0%} of what it can."
            )
    elif not _across_nodes(plan):
        lines.append("No KV cache crosses a link between nodes.")
    return lines


def choice_lines(plan: Plan) -> list[str]:
    """For each group, alike ones said once, what its best other layout and its best other role would cost."""
    lines: list[str] = []
    for groups in alike(plan):
        first = groups[0]
        words = [_runner_up(first, one) for one in first.runners_up]
        if words:
            lines.append(f"{ids_words(groups)} ({first.role}): {'; '.join(words)}.")
    return lines


def rule_lines(plan: Plan) -> list[str]:
    """What the engine profile's rules cost the whole plan, then single groups; the dearest first."""
    entries = sorted(plan.rejected, key=lambda entry: (entry.group is not None, -(entry.gain or 0.0)))
    return [f"{entry.rule}: {entry.detail}." for entry in entries]


def more_lines(plan: Plan) -> list[str]:
    """The largest shadow prices, GPUs first."""
    lines = [_price([price.resource], price) for price in plan.shadow_prices if price.kind == "gpu"]
    like: dict[tuple[str, ...], list[ShadowPrice]] = {}
    for price in sorted(plan.shadow_prices, key=lambda price: -price.gain_rps):
        if price.kind != "gpu":
            like.setdefault((price.kind, price.change, f"{price.gain_rps:.3g}", price.resource[:1]), []).append(
                price
            )
    for prices in list(like.values())[:MOST_PRICES]:
        lines.append(_price([price.resource for price in prices], prices[0]))
    left = sum(len(prices) for prices in list(like.values())[MOST_PRICES:])
    return [*lines, f"{left} smaller ones are in the plan file."] if left else lines


def rate_words(bytes_per_s: float) -> str:
    """'3.2 GB/s', '40 MB/s'."""
    return f"{bytes_per_s / 1e9:.3g} GB/s" if bytes_per_s >= 1e9 else f"{bytes_per_s / 1e6:.3g} MB/s"


def load(plan: Plan, groups: tuple[Group, ...]) -> float:
    """Requests/s through groups over what they could serve."""
    capacity = sum(group.capacity_rps for group in groups)
    return sum(group.share for group in groups) * plan.throughput_rps / capacity if capacity else 0.0


def _across_nodes(plan: Plan) -> bool:
    """Whether some route leaves its node (a plan of an earlier release does not say what its links carry)."""
    nodes = {group.id: {gpu.rsplit("/", 1)[0] for gpu in group.gpus} for group in plan.groups}
    return any(len(nodes[route.source] | nodes[route.target]) > 1 for route in plan.routes)


def _runner_up(group: Group, one: RunnerUp) -> str:
    what = f"next best {one.layout}" if one.role == group.role else f"as {one.role} {one.layout}"
    if one.loss <= -UNLIKE:
        return f"{what} ({-one.loss:.1%} more, but this solver chooses layouts by another rule)"
    return f"{what} ({'as good' if one.loss < UNLIKE else f'{one.loss:.1%} less'})"


def _price(names: Sequence[str], price: ShadowPrice) -> str:
    gain = f"+{price.gain_rps:.3g} req/s" if price.gain_rps > 0 else "nothing found"
    if price.kind == "gpu":
        return f"{price.resource}, {price.change}: {gain}."
    what = "capacity" if price.kind == "group" else "bandwidth"
    each = "each of " if len(names) > 1 else ""
    roles = {name[0] for name in names}
    one_role = price.kind == "group" and len(roles) == 1 and all(name[1:].isdigit() for name in names)
    return f"{price.change} {what} of {each}{runs_words(names) if one_role else ', '.join(names)}: {gain}."
