"""A plan as tables for a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from hexgen2.report.words import group_line, nodes_words
from hexgen2.specs.plan import Group, Plan


def print_plan(console: Console, plan: Plan) -> None:
    """Groups with their arithmetic, routes, bottleneck, price and time."""
    cluster = plan.cluster
    console.print(
        f"[bold]{plan.model}[/] on {cluster.name} ({len(cluster.gpus)} GPUs, ${cluster.price_per_hour:.2f}/h), "
        f"workload {plan.workload}, engine {plan.engine}, solver {plan.solver}"
    )
    console.print()
    for group in plan.groups:
        console.print(f"[bold]{group_line(plan, group)}[/]")
        console.print(
            f"    takes {group.share:.1%} of all requests, load {_load(plan, group):.0%}, "
            f"${group.price_per_hour:.2f}/h, GPUs {nodes_words(group)}"
        )
    if plan.routes:
        console.print()
        routes = Table(title="KV routes", title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
        routes.add_column("route")
        for heading in ("share", "req/s", "links could carry"):
            routes.add_column(heading, justify="right")
        for route in plan.routes:
            routes.add_row(
                f"{route.source} → {route.target}",
                f"{route.share:.1%}",
                f"{route.rps:.3g}",
                f"{route.capacity_rps:.3g}",
            )
        console.print(routes)
    console.print()
    value = f"{plan.objective.name} {plan.objective.value:.4g} {plan.objective.unit}"
    console.print(
        f"[bold]{value}[/], {plan.output_tokens_per_s:.0f} output tokens/s, ${plan.price_per_hour:.2f}/h"
    )
    console.print(f"bottleneck: {plan.bottleneck.text}")
    if plan.upper_bound is not None and plan.gap is not None:
        console.print(f"upper bound {plan.upper_bound:.4g}, gap {plan.gap:.1%}")
    for rejection in plan.rejected:
        gain = "" if rejection.gain is None else f" (+{rejection.gain:.1%})"
        console.print(f"rejected by {rejection.rule}: {rejection.detail}{gain}")
    for note in plan.notes:
        console.print(f"note: {note}")
    console.print(f"planned in {plan.wall_s:.2f} s")


def _load(plan: Plan, group: Group) -> float:
    return group.share * plan.throughput_rps / group.capacity_rps if group.capacity_rps else 0.0
