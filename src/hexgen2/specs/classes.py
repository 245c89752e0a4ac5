"""Request classes: requests told apart by the length of their prompt and the answer they ask for.

A plan may route classes differently. Whoever routes knows the length of a prompt, exactly or about, and the
``max_tokens`` of the request, where it names any; never the length of the answer. Classes are told apart by
these two.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pydantic import Field, model_validator

from hexgen2.specs.base import Spec

SHARE_TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True)
class RequestSize:
    """What is known of a request before it runs, in tokens; None where it is not known."""

    prompt_tokens: float | None = None
    max_tokens: int | None = None


class RequestClass(Spec):
    """Requests with prompts of ``prompt_from`` … ``prompt_to`` − 1 tokens that ask for ``output_from`` …
    ``output_to`` − 1 tokens (None: no upper end). ``fraction`` is the part of all requests that are of it."""

    name: str = Field(min_length=1)
    prompt_from: int = Field(default=0, ge=0)
    prompt_to: int | None = Field(default=None, ge=1)
    output_from: int = Field(default=0, ge=0)
    output_to: int | None = Field(default=None, ge=1)
    fraction: float = Field(gt=0, le=1)

    @model_validator(mode="after")
    def _not_empty(self) -> RequestClass:
        for what, start, end in (
            ("prompt", self.prompt_from, self.prompt_to),
            ("output", self.output_from, self.output_to),
        ):
            if end is not None and end <= start:
                raise ValueError(
                    f"{what}_to is {end} and {what}_from {start}: no request is in the class; "
                    f"make {what}_to larger"
                )
        return self

    def may_contain(self, size: RequestSize) -> bool:
        """Whether a request of which this much is known may belong to the class."""
        return _within(size.prompt_tokens, self.prompt_from, self.prompt_to) and _within(
            size.max_tokens, self.output_from, self.output_to
        )


ClassShares = Mapping[str, float]
"""Class name → the part of that class's requests that goes here."""


def check_class_shares(classes: Sequence[RequestClass], ways: Iterable[tuple[str, ClassShares]]) -> None:
    """ValueError unless the fractions of the classes sum to 1, and each class's shares over all ways (routes
    and colocated groups, with what messages call them) too. Without classes there must be no such shares."""
    names = [one.name for one in classes]
    if len(set(names)) < len(names):
        raise ValueError("two request classes have one name; give each its own")
    if classes and abs(math.fsum(one.fraction for one in classes) - 1) > SHARE_TOLERANCE:
        raise ValueError("the fractions of the request classes do not sum to 1; correct them")
    totals = dict.fromkeys(names, 0.0)
    for way, shares in ways:
        for name, share in shares.items():
            if name not in totals:
                raise ValueError(f"{way}: class_shares names {name!r}, which is no request class; correct it")
            totals[name] += share
    for name, total in totals.items():
        if abs(total - 1) > SHARE_TOLERANCE:
            raise ValueError(f"the shares of class {name!r} sum to {total:.6f}; make them sum to 1")


def _within(value: float | None, start: int, end: int | None) -> bool:
    return value is None or (value >= start and (end is None or value < end))
