"""The objective over the time of the search, from a trace that `hexgen2 plan --trace` wrote."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, ValidationError

from hexgen2.report.page.markup import Markup, element, picture
from hexgen2.specs.base import Spec
from hexgen2.specs.errors import InputError
from hexgen2.specs.files import read_json

WIDTH, HEIGHT = 380.0, 190.0
LEFT, RIGHT, TOP, BOTTOM = 44.0, 10.0, 12.0, 30.0
TICKS = 4


class TracePoint(Spec):
    """A better plan: seconds since the start, the phase of the search, requests/s."""

    seconds: float = Field(ge=0)
    phase: str
    value: float = Field(ge=0)


@dataclass(frozen=True)
class Trace:
    """All better plans of a search in order, and when it ended."""

    points: tuple[TracePoint, ...]
    end_s: float


class _Document(Spec):
    points: tuple[TracePoint, ...] = Field(min_length=1)
    end_s: float = Field(ge=0)


def load_trace(path: str | Path) -> Trace:
    """Read a trace file; InputError names what is wrong with it."""
    try:
        found = _Document.model_validate(read_json(path, "trace of `hexgen2 plan --trace`"))
    except ValidationError as error:
        raise InputError.from_validation(str(path), error) from None
    return Trace(found.points, found.end_s)


def progress_svg(trace: Trace) -> Markup:
    """The best value known at each moment, as steps."""
    end = max(trace.end_s, trace.points[-1].seconds, 1e-9)
    top = max(point.value for point in trace.points) * 1.05 or 1.0
    bottom = min(point.value for point in trace.points) * 0.9

    def across(seconds: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * seconds / end

    def up(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - bottom) / (top - bottom)

    steps = f"M{across(trace.points[0].seconds):.1f} {up(trace.points[0].value):.1f}"
    for point in trace.points[1:]:
        steps += f"H{across(point.seconds):.1f}V{up(point.value):.1f}"
    steps += f"H{across(end):.1f}"
    parts: list[Markup] = []
    for tick in range(TICKS + 1):
        value, seconds = bottom + (top - bottom) * tick / TICKS, end * tick / TICKS
        parts.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=up(value), y2=up(value), class_="grid"))
        parts.append(_tick(f"{value:.3g}", LEFT - 5, up(value) + 4, "end"))
        anchor = "start" if tick == 0 else "end" if tick == TICKS else "middle"
        parts.append(_tick(f"{seconds:.2g} s", across(seconds), HEIGHT - BOTTOM + 15, anchor))
    parts.append(element("path", d=steps, class_="steps"))
    last = trace.points[-1]
    words = (
        f"Requests/s of the best plan known, from {trace.points[0].value:.3g} to {last.value:.3g}, "
        f"the last better one after {last.seconds:.2g} of {end:.2g} seconds."
    )
    return picture(WIDTH, HEIGHT, "Objective over the time of the search", words, parts)


def trace_document(points: Sequence[TracePoint], end_s: float) -> dict[str, object]:
    """What `load_trace` reads."""
    return {"points": [point.model_dump() for point in points], "end_s": end_s}


def _tick(text: str, x: float, y: float, anchor: str) -> Markup:
    return element("text", text, x=x, y=y, class_="tick", text_anchor=anchor)
