"""The base of every spec: frozen, no unknown fields."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Spec(BaseModel):
    """A frozen, validated value.

    Unknown fields are refused so that a misspelt one is never ignored, and numbers are finite (YAML knows .inf
    and .nan, JSON does not).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, allow_inf_nan=False)
