"""The base of every spec: frozen, no unknown fields."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Self

from pydantic import BaseModel, ConfigDict


class Spec(BaseModel):
    """A frozen, validated value.

    Unknown fields are refused so that a misspelt one is never ignored, and numbers are finite (YAML knows .inf
    and .nan, JSON does not).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, allow_inf_nan=False)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with other values. What was computed from the old ones and kept is computed anew."""
        copy = super().model_copy(update=update, deep=deep)
        for name in list(copy.__dict__):
            if isinstance(getattr(type(copy), name, None), cached_property):
                del copy.__dict__[name]
        return copy
