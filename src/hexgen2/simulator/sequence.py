"""A request under way."""

from __future__ import annotations

from dataclasses import dataclass
from math import nan
from typing import Any


@dataclass(slots=True, eq=False)
class Sequence:
    """One request. Times in seconds, NaN until they have come.

    ``pending`` tokens are still to be prefilled on the engine that answers: the prompt on a colocated group,
    prompt and generated tokens after a preemption, none when the KV cache comes from a prefill group.
    ``blocks`` are the KV blocks that it holds there before it decodes, ``context`` and ``step`` its cached
    tokens and the engine's step count when it began to decode.
    """

    number: int
    inputs: int
    outputs: int
    arrival: float
    chosen: float = nan
    path: Any = None
    prefilled: float = nan
    transfer_start: float = nan
    transferred: float = nan
    first: float = nan
    end: float = nan
    generated: int = 0
    pending: int = 0
    done_prompt: int = 0
    blocks: int = 0
    context: int = 0
    step: int = 0
    finish_step: int = 0
    preemptions: int = 0
