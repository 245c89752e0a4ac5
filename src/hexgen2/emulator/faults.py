"""Failures on demand, as a proxy sees them from real vLLM engines. For tests only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

FaultKind = Literal["die", "hang", "error_event", "finish_error", "http_500", "http_503", "cut", "no_end"]
FAULT_KINDS: tuple[str, ...] = get_args(FaultKind)


@dataclass
class Fault:
    """What goes wrong, and after how many generated tokens (of a request, counted per sequence).

    - die: the engine's process leaves at once (in-process servers close every connection)
    - hang: nothing more is sent, connections stay open, /health no longer answers
    - error_event: streams get an SSE `error` event and then `[DONE]`, as from vLLM when its core dies; plain
      requests HTTP 500
    - finish_error: HTTP 200 whose `finish_reason` is "error"
    - http_500, http_503: the request is refused with that status before it runs
    - cut: the connection is closed in the middle of an event
    - no_end: a stream's `[DONE]` comes, the end of its body does not
    """

    kind: FaultKind
    after_tokens: int = 0
    times: int | None = None  # how many requests it hits; None: all

    def take(self) -> bool:
        """Whether it hits the request at hand; counts it."""
        if self.times is None:
            return True
        if self.times <= 0:
            return False
        self.times -= 1
        return True
