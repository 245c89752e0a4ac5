"""How long an emulated engine takes: the seam through which the cost model drives it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class Timing(Protocol):
    """Seconds an engine spends on each kind of work. Implementations are pure."""

    def prefill_s(self, tokens: int) -> float:
        """Seconds to compute the KV cache of `tokens` prompt tokens that run together."""
        ...

    def decode_step_s(self, batch: int, context: int) -> float:
        """Seconds of one decode step of `batch` sequences whose contexts sum to `context` tokens."""
        ...

    def kv_transfer_s(self, tokens: int) -> float:
        """Seconds until the KV cache of `tokens` prompt tokens has arrived from another engine."""
        ...


@dataclass(frozen=True)
class LinearTiming:
    """Affine in the tokens: enough for tests and for load that needs no particular GPU."""

    prefill_base_s: float = 0.001
    prefill_per_token_s: float = 0.0
    step_base_s: float = 0.001
    step_per_sequence_s: float = 0.0
    step_per_context_token_s: float = 0.0
    kv_per_token_s: float = 0.0

    def prefill_s(self, tokens: int) -> float:
        return self.prefill_base_s + tokens * self.prefill_per_token_s

    def decode_step_s(self, batch: int, context: int) -> float:
        return self.step_base_s + batch * self.step_per_sequence_s + context * self.step_per_context_token_s

    def kv_transfer_s(self, tokens: int) -> float:
        return tokens * self.kv_per_token_s
