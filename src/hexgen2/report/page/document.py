"""The page of a plan: figures, pictures, groups, reasons, routes. One HTML file, no script, nothing loaded."""

from __future__ import annotations

from collections.abc import Sequence

from hexgen2 import __version__
from hexgen2.report.page.flows import flows_svg
from hexgen2.report.page.markup import Markup, element, joined, style_text
from hexgen2.report.page.network import network_svg, nodes_shown
from hexgen2.report.page.progress import Trace, progress_svg
from hexgen2.report.reasons import FULL, explanation, load, rate_words
from hexgen2.report.words import alike, ids_words, layout_words, nodes_words
from hexgen2.specs.plan import Group, Plan

TITLES = {
    "limits": "What limits it",
    "choices": "Why these roles and layouts",
    "rules": "What the engine's rules cost",
    "more": "What more would add",
}
MOST_LISTED = 8
"""Alike groups whose GPUs are listed; the plan file has all."""


def plan_page(plan: Plan, trace: Trace | None = None) -> str:
    """The whole HTML document; ``trace`` adds how the search went."""
    title = f"{plan.model} on {plan.cluster.name}: {plan.objective.value:.3g} requests/s"
    body = [
        _header(plan),
        element("main", *_pictures(plan), _groups(plan), *_reasons(plan), *_search(trace), *_tables(plan)),
        _footer(plan),
    ]
    head = element(
        "head",
        Markup('<meta charset="utf-8">'),
        Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Markup('<meta name="color-scheme" content="light dark">'),
        element("title", title),
        element("style", Markup(style_text())),
    )
    return f"<!doctype html>\n{element('html', head, element('body', joined(body)), lang='en')}\n"


def _header(plan: Plan) -> Markup:
    cluster = plan.cluster
    figures = [
        (plan.objective.name, f"{plan.objective.value:.4g} req/s"),
        ("output", f"{plan.output_tokens_per_s:,.0f} tokens/s"),
        ("price", f"${plan.price_per_hour:.2f}/h"),
        ("GPUs in use", f"{sum(len(group.gpus) for group in plan.groups)} of {len(cluster.gpus)}"),
    ]
    if plan.gap is not None and plan.upper_bound is not None:
        figures.append(("no plan beats it by more than", f"{plan.gap:.1%}"))
    return element(
        "header",
        element("h1", f"{plan.model} on {cluster.name}"),
        element("p", f"workload {plan.workload}, engine {plan.engine}, solver {plan.solver}", class_="soft"),
        element(
            "dl",
            *(element("div", element("dt", name), element("dd", value)) for name, value in figures),
            class_="figures",
        ),
        element("p", f"{explanation(plan)['limits'][0]}", class_="limit"),
    )


def _pictures(plan: Plan) -> list[Markup]:
    keys = [
        element("span", element("span", class_=f"key {role}", aria_hidden="true"), role, class_="keyed")
        for role in ("prefill", "decode", "colocated", "idle")
    ]
    flows = element(
        "figure",
        flows_svg(plan),
        element(
            "figcaption",
            "Boxes are groups with their share of all requests"
            + ("; ribbons carry KV caches." if plan.routes else "."),
        ),
    )
    network = element(
        "figure",
        network_svg(plan),
        element(
            "figcaption",
            _nodes_shown(plan),
            "Squares are GPUs:",
            *(Markup(f" {key}") for key in keys),
            ". Lines are KV caches, red where a link is full; dashed ones join the stages of a pipeline.",
        ),
    )
    return [
        _section("The plan", "pictures", [element("div", flows, network, class_="pictures")]),
    ]


def _nodes_shown(plan: Plan) -> str:
    shown, everything = len(nodes_shown(plan)), len(plan.cluster.nodes)
    return "" if shown == everything else f"{shown} of {everything} nodes, those with most KV traffic. "


def _groups(plan: Plan) -> Markup:
    rows = []
    for groups in alike(plan):
        first = groups[0]
        share = sum(group.share for group in groups)
        each = " each" if len(groups) > 1 else ""
        busy = load(plan, tuple(groups))
        rows.append(
            element(
                "tr",
                element(
                    "th",
                    f"{ids_words(groups)} ",
                    element("span", first.role, class_=f"role {first.role}"),
                    scope="row",
                ),
                element("td", layout_words(plan, first)),
                element("td", _gpus(groups), data_label="GPUs"),
                element("td", f"{first.capacity_rps:.3g} req/s{each}", class_="number", data_label="rate"),
                element("td", f"{share:.1%}", class_="number", data_label="share"),
                element("td", f"{busy:.0%}", _bar(busy), class_="number", data_label="load"),
                element(
                    "td",
                    f"${sum(group.price_per_hour for group in groups):.2f}/h",
                    class_="number",
                    data_label="price",
                ),
            )
        )
    headings = ("group", "layout", "GPUs", "rate", "share", "load", "price")
    return _section("Groups", "groups", [_table("Serving groups, alike ones in one row", headings, rows, 3)])


def _reasons(plan: Plan) -> list[Markup]:
    return [
        _section(TITLES[subject], subject, [element("ul", *(element("li", line) for line in lines))])
        for subject, lines in explanation(plan).items()
        if lines
    ]


def _search(trace: Trace | None) -> list[Markup]:
    if trace is None:
        return []
    caption = element("figcaption", f"{len(trace.points)} better plans in {trace.end_s:.2g} s.")
    return [_section("How the search went", "search", [element("figure", progress_svg(trace), caption)])]


def _tables(plan: Plan) -> list[Markup]:
    found: list[Markup] = []
    if plan.routes:
        rows = [
            element(
                "tr",
                element("th", f"{route.source} → {route.target}", scope="row"),
                element("td", f"{route.share:.1%}", class_="number", data_label="share"),
                element("td", f"{route.rps:.3g}", class_="number", data_label="req/s"),
                element("td", f"{route.capacity_rps:.3g}", class_="number", data_label="links could carry"),
            )
            for route in plan.routes
        ]
        table = _table("Routes of KV caches", ("route", "share", "req/s", "links could carry, req/s"), rows, 1)
        found.append(element("details", element("summary", f"All {len(plan.routes)} routes"), table))
    if plan.links:
        rows = [
            element(
                "tr",
                element("th", f"{link.source} → {link.target}", scope="row"),
                element("td", rate_words(link.bytes_per_s), class_="number", data_label="carries"),
                element("td", f"{link.use:.0%}", _bar(link.use), class_="number", data_label="in use"),
            )
            for link in plan.links
        ]
        table = _table("Links that KV caches cross", ("link", "carries", "in use"), rows, 1)
        found.append(element("details", element("summary", f"All {len(plan.links)} links in use"), table))
    return [_section("Routes and links", "routes", found)] if found else []


def _footer(plan: Plan) -> Markup:
    notes = [element("li", note) for note in plan.notes]
    return element(
        "footer",
        *([element("ul", *notes)] if notes else []),
        element("p", f"Planned in {plan.wall_s:.2f} s, seed {plan.seed}. HexGen-2 {__version__}."),
    )


def _section(title: str, name: str, parts: Sequence[Markup]) -> Markup:
    heading = element("h2", title, id=f"{name}-heading")
    return element("section", heading, *parts, aria_labelledby=f"{name}-heading")


def _table(caption: str, headings: Sequence[str], rows: Sequence[Markup], texts: int) -> Markup:
    """A table whose rows become cards on a phone; the first ``texts`` columns are no numbers."""
    cells = [
        element("th", heading, scope="col", class_=None if place < texts else "number")
        for place, heading in enumerate(headings)
    ]
    return element(
        "table",
        element("caption", caption),
        element("thead", element("tr", *cells)),
        element("tbody", *rows),
        class_="cards",
    )


def _gpus(groups: Sequence[Group]) -> str:
    """The GPUs of the first groups, and how many groups more there are."""
    words = ", ".join(map(nodes_words, groups[:MOST_LISTED]))
    return f"{words} and {len(groups) - MOST_LISTED} groups more" if len(groups) > MOST_LISTED else words


def _bar(part: float) -> Markup:
    width = f"width:{min(1.0, part):.1%}"
    full = " full" if part >= FULL else ""
    return element("span", element("span", style=width), class_=f"bar{full}", aria_hidden="true")
