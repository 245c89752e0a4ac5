"""A plan as tables for a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from hexgen2.report.terminal import headed
from hexgen2.report.words import alike, class_lines, group_line, ids_words, nodes_words, rate_lines
from hexgen2.specs.plan import Group, Plan

MOST_ROUTES = 24
"""Routes shown, the busiest; the plan file has all."""


def print_plan(console: Console, plan: Plan) -> None:
    """Groups with their arithmetic, routes, bottleneck, price and time."""
    cluster = plan.cluster
    console.print(
        headed(
            plan.model,
            f" on {cluster.name} ({len(cluster.gpus)} GPUs, ${cluster.price_per_hour:.2f}/h), "
            f"workload {plan.workload}, engine {plan.engine}, solver {plan.solver}",
        )
    )
    console.print()
    for groups in alike(plan):
        first, several = groups[0], len(groups) > 1
        name = f"{ids_words(groups)} ({len(groups)} alike)" if several else first.id
        console.print(headed(group_line(plan, first, name), " each" if several else ""))
        console.print(
            f"    {'take' if several else 'takes'} {sum(group.share for group in groups):.1%} of all requests, "
            f"load {_load(plan, first):.0%}, ${sum(group.price_per_hour for group in groups):.2f}/h, "
            f"GPUs {', '.join(map(nodes_words, groups))}"
        )
    if plan.routes:
        console.print()
        routes = Table(title="KV routes", title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
        routes.add_column("route")
        for heading in ("share", "req/s", "links could carry"):
            routes.add_column(heading, justify="right")
        shown = sorted(plan.routes, key=lambda route: -route.share)[:MOST_ROUTES]
        for route in (route for route in plan.routes if route in shown):
            routes.add_row(
                f"{route.source} → {route.target}",
                f"{route.share:.1%}",
                f"{route.rps:.3g}",
                f"{route.capacity_rps:.3g}",
            )
        console.print(routes)
        if len(plan.routes) > MOST_ROUTES:
            rest = sum(route.share for route in plan.routes if route not in shown)
            console.print(f"and {len(plan.routes) - MOST_ROUTES} more with {rest:.1%} together")
    console.print()
    value = f"{plan.objective.name} {plan.objective.value:.4g} {plan.objective.unit}"
    console.print(
        headed(value, f", {plan.output_tokens_per_s:.0f} output tokens/s, ${plan.price_per_hour:.2f}/h")
    )
    console.print(f"bottleneck: {plan.bottleneck.text}")
    if plan.upper_bound is not None and plan.gap is not None:
        console.print(f"upper bound {plan.upper_bound:.4g}, gap {plan.gap:.1%}")
    whole = [entry for entry in plan.rejected if entry.group is None]
    dearest = max(whole, key=lambda entry: entry.gain or 0.0, default=None)
    if dearest is not None:
        console.print(f"engine rule {dearest.rule}: {dearest.detail}")
    for line in (*class_lines(plan), *rate_lines(plan)):
        console.print(line)
    for note in plan.notes:
        console.print(f"note: {note}")
    console.print(f"planned in {plan.wall_s:.2f} s")


def _load(plan: Plan, group: Group) -> float:
    return group.share * plan.throughput_rps / group.capacity_rps if group.capacity_rps else 0.0
