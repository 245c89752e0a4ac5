"""The answer of `hexgen2 budget`: the mix, the price/throughput frontier as a table, a document and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from hexgen2.report.picture import save_figure
from hexgen2.report.terminal import headed
from hexgen2.specs.offers import Mix, Offers

if TYPE_CHECKING:  # whoever serves shows pages too, and must not load solvers for that
    from hexgen2.scheduler.budget import Answer, Asked, Rented

HOUR = 3600.0


def mix_words(offers: Offers, mix: Mix) -> str:
    """'2 × h100 (8×H100-80G-SXM) + 1 × l40 (4×L40)'."""
    return " + ".join(
        f"{count} × {offer.name} ({offer.count}×{offer.gpu})"
        for count, offer in zip(mix, offers.offers, strict=True)
        if count
    )


def dollars_per_million(rented: Rented) -> float:
    """USD per million output tokens with every rented node busy."""
    return rented.price / (rented.plan.output_tokens_per_s * HOUR) * 1e6


def rented_document(offers: Offers, rented: Rented) -> dict[str, Any]:
    """A mix with its figures as JSON."""
    return {
        "mix": [
            {"offer": o.name, "gpu": o.gpu, "nodes": n, "gpus": n * o.count, "price_per_hour": n * o.node_price}
            for n, o in zip(rented.mix, offers.offers, strict=True)
            if n
        ],
        "gpus": offers.gpus(rented.mix),
        "price_per_hour": rented.price,
        "throughput_rps": rented.rps,
        "output_tokens_per_s": rented.plan.output_tokens_per_s,
        "usd_per_million_output_tokens": dollars_per_million(rented),
        "estimate_rps": rented.estimate,
    }


def answer_document(offers: Offers, asked: Asked, answer: Answer) -> dict[str, Any]:
    """The JSON document of `hexgen2 budget`."""
    best = answer.best
    return {
        "catalog": offers.name,
        "model": best.plan.model,
        "workload": best.plan.workload,
        "engine": best.plan.engine,
        "objective": best.plan.objective.name,
        "asked": {"hourly_usd": asked.hourly, "rate_rps": asked.rate, "max_gpus": asked.max_gpus},
        **rented_document(offers, best),
        "template_bound": {
            "value": answer.bound,
            "unit": "requests/s" if asked.hourly is not None else "USD/hour",
        },
        "frontier": [rented_document(offers, rented) for rented in answer.frontier],
        "alone": [
            {"gpu": alone.gpu, **({} if alone.best is None else rented_document(offers, alone.best))}
            for alone in answer.alone
        ],
        "mixes_planned": answer.planned,
        "plan": best.plan.document(),
    }


def print_answer(console: Console, offers: Offers, asked: Asked, answer: Answer) -> None:
    """The answer for a person: what to rent, what it serves, what more or less money and one type would."""
    best = answer.best
    wish = f"${asked.hourly:g}/h" if asked.hourly is not None else f"{asked.rate:g} requests/s"
    console.print(
        headed(
            best.plan.model,
            f" from {offers.name} for {wish}, workload {best.plan.workload}, "
            f"engine {best.plan.engine}, {best.plan.objective.name}",
        )
    )
    console.print()
    console.print(headed(f"rent {mix_words(offers, best.mix)}"))
    console.print(
        f"    {offers.gpus(best.mix)} GPUs, ${best.price:.2f}/h → {_rate(best.rps)} req/s, "
        f"{best.plan.output_tokens_per_s:.0f} output tokens/s, "
        f"${dollars_per_million(best):.2f} per million output tokens"
    )
    console.print(f"    {gain_words(asked, answer)}")
    console.print()
    console.print(_table(offers, "what more or less money buys", [("", rented) for rented in answer.frontier]))
    console.print()
    console.print(_table(offers, "one GPU type alone", [(alone.gpu, alone.best) for alone in answer.alone]))
    console.print()
    console.print(f"mixes planned: {answer.planned}")


def gain_words(asked: Asked, answer: Answer) -> str:
    """What mixing gains over the best single type."""
    best = answer.best
    alone = [(found.gpu, found.best) for found in answer.alone if found.best is not None]
    if not alone:
        return "no single GPU type can do this"
    if asked.hourly is not None:
        gpu, other = max(alone, key=lambda pair: pair[1].rps)
        if other.rps >= best.rps * (1 - 1e-9):
            return f"one GPU type does as well: {gpu}"
        return (
            f"{best.rps / other.rps - 1:.0%} more than the best single type ({gpu}, {_rate(other.rps)} req/s)"
        )
    gpu, other = min(alone, key=lambda pair: pair[1].price)
    if other.price <= best.price * (1 + 1e-9):
        return f"one GPU type does as well: {gpu}"
    return f"{1 - best.price / other.price:.0%} cheaper than the best single type ({gpu}, ${other.price:.2f}/h)"


def save_frontier(offers: Offers, asked: Asked, answer: Answer, path: str | Path) -> None:
    """The frontier as a picture (.svg, .png or .pdf): price across, requests/s up, single types beside it."""
    save_figure(path, lambda figure: _draw(figure, offers, asked, answer))


def _draw(figure: Any, offers: Offers, asked: Asked, answer: Answer) -> None:
    figure.set_size_inches(8.4, 5.0)
    axes = figure.add_subplot()
    prices = [rented.price for rented in answer.frontier]
    rates = [rented.rps for rented in answer.frontier]
    axes.step(prices, rates, where="post", color="#1f5fa8", lw=1.8, zorder=2)
    axes.plot(prices, rates, "o", color="#1f5fa8", ms=5, zorder=3, label="best mix for the price")
    best = answer.best
    axes.plot(
        [best.price], [best.rps], "o", mfc="none", mec="#111111", ms=12, mew=1.6, zorder=4, label="chosen"
    )
    markers = "s^Dv<>pP*X"
    for place, alone in enumerate(found for found in answer.alone if found.best is not None):
        assert alone.best is not None
        axes.plot(
            [alone.best.price],
            [alone.best.rps],
            markers[place % len(markers)],
            color="#c2620c",
            ms=6,
            zorder=3,
            ls="none",
            label=f"only {alone.gpu}",
        )
    if asked.hourly is not None:
        axes.axvline(asked.hourly, color="#777777", lw=1, ls="--", zorder=1)
    elif asked.rate is not None:
        axes.axhline(asked.rate, color="#777777", lw=1, ls="--", zorder=1)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("USD per hour")
    axes.set_ylabel("requests/s")
    axes.grid(color="#e5e5e5", lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(
        f"{best.plan.model}, workload {best.plan.workload}, from {offers.name}", loc="left", fontsize=11
    )
    axes.legend(frameon=False, fontsize=8.5, loc="upper left")


def _table(offers: Offers, title: str, rows: list[tuple[str, Rented | None]]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    labelled = any(label for label, _ in rows)
    if labelled:
        table.add_column("")
    for heading in ("USD/h", "GPUs", "req/s", "USD/M tokens"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("mix (nodes × offer)")
    for label, rented in rows:
        lead = (label,) if labelled else ()
        if rented is None:
            table.add_row(*lead, "", "", "-", "", "cannot do it")
            continue
        mix = " + ".join(f"{n} × {o.name}" for n, o in zip(rented.mix, offers.offers, strict=True) if n)
        table.add_row(
            *lead,
            f"{rented.price:.2f}",
            str(offers.gpus(rented.mix)),
            _rate(rented.rps),
            f"{dollars_per_million(rented):.2f}",
            mix,
        )
    return table


def _rate(rps: float) -> str:
    return f"{rps:#.3g}" if rps < 100 else f"{rps:.0f}"
