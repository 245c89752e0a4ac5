"""The JSON that `simulate` and `bench` share (DESIGN section 9), computed from per-request figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hexgen2.specs.plan import Slo

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Served:
    """What happened to each completed request; arrays of shape (n,), seconds and tokens.

    ``tpot_s`` is (end − first token) / (output tokens − 1), NaN for answers of one token.
    """

    ttft_s: FloatArray
    tpot_s: FloatArray
    e2e_s: FloatArray
    output_tokens: FloatArray


@dataclass(frozen=True)
class KvTransfers:
    """KV caches moved between groups: all bytes, and the mean and 99th percentile of a transfer's seconds."""

    bytes: float = 0.0
    mean_s: float | None = None
    p99_s: float | None = None


@dataclass(frozen=True)
class Results:
    """A run of a workload. ``duration_s`` runs from the first arrival to the last completion."""

    served: Served
    failed: int
    duration_s: float
    slo: Slo = field(default_factory=Slo)
    kv_transfer: KvTransfers = field(default_factory=KvTransfers)
    per_group: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """The results as the JSON object of DESIGN section 9."""
        served, seconds = self.served, self.duration_s
        completed = len(served.e2e_s)
        met = self._meets_slo()
        attainment = float(met.mean()) if completed else 0.0
        total = completed + self.failed
        return {
            "requests": total,
            "completed": completed,
            "failed": self.failed,
            "duration_s": seconds,
            "throughput_rps": completed / seconds if seconds else 0.0,
            "output_tokens_per_s": float(served.output_tokens.sum()) / seconds if seconds else 0.0,
            "ttft_s": percentiles(served.ttft_s),
            "tpot_s": percentiles(served.tpot_s),
            "e2e_s": percentiles(served.e2e_s),
            "slo": {
                "ttft": self.slo.ttft_s,
                "tpot": self.slo.tpot_s,
                "attainment": attainment * completed / total if total else 0.0,
                "goodput_rps": float(met.sum()) / seconds if seconds else 0.0,
            },
            "kv_transfer": {
                "bytes": self.kv_transfer.bytes,
                "mean_s": self.kv_transfer.mean_s,
                "p99_s": self.kv_transfer.p99_s,
            },
            "per_group": {group: dict(figures) for group, figures in self.per_group.items()},
        }

    def _meets_slo(self) -> NDArray[np.bool_]:
        """Which completed requests met both targets; one-token answers have no TPOT and meet any."""
        met = np.ones(len(self.served.e2e_s), dtype=bool)
        if self.slo.ttft_s is not None:
            met &= self.served.ttft_s <= self.slo.ttft_s
        if self.slo.tpot_s is not None:
            met &= ~(self.served.tpot_s > self.slo.tpot_s)
        return met


def percentiles(values: FloatArray) -> dict[str, float | None]:
    """Mean, P50, P90 and P99 of the numbers among ``values``; None where there are none."""
    known = values[~np.isnan(values)]
    if not len(known):
        return {"mean": None, "p50": None, "p90": None, "p99": None}
    p50, p90, p99 = np.percentile(known, [50, 90, 99])
    return {"mean": float(known.mean()), "p50": float(p50), "p90": float(p90), "p99": float(p99)}
