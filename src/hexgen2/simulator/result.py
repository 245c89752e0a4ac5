"""What a simulation found: the shared results, and when each request passed each point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hexgen2.simulator.sequence import Sequence as Request
from hexgen2.specs.plan import Slo
from hexgen2.specs.results import KvTransfers, Results, Served
from hexgen2.specs.routing import Path
from hexgen2.specs.workload import FloatArray, IntArray


@dataclass(frozen=True)
class Timeline:
    """Points in time of every request, arrays of shape (n,) in order of arrival, seconds, NaN where not
    reached.

    ``paths`` are the paths that were taken, ``path`` the place of each request's among them, −1 where it
    failed.
    """

    arrival: FloatArray
    prefilled: FloatArray
    transfer_start: FloatArray
    transferred: FloatArray
    first: FloatArray
    end: FloatArray
    path: IntArray
    preemptions: IntArray
    paths: tuple[Path, ...]


@dataclass(frozen=True)
class SimulationResult:
    """Results under the keys of DESIGN section 9, and the timeline that they were computed from."""

    results: Results
    timeline: Timeline

    def document(self) -> dict[str, Any]:
        """The results as the JSON object that `simulate` and `bench` share."""
        return self.results.document()


def summarise(
    requests: Sequence[Request],
    paths: Sequence[Path],
    kv_bytes: float,
    slo: Slo,
    per_group: Mapping[str, Mapping[str, Any]],
) -> SimulationResult:
    """Collect the requests' times; one that has no end has failed."""
    place = {path: index for index, path in enumerate(paths)}

    def column(name: str) -> FloatArray:
        return np.array([getattr(request, name) for request in requests], dtype=np.float64)

    arrival, first, end = column("arrival"), column("first"), column("end")
    start, there = column("transfer_start"), column("transferred")
    outputs = column("outputs")
    done = ~np.isnan(end)
    tokens = outputs[done]
    with np.errstate(divide="ignore", invalid="ignore"):
        tpot = np.where(tokens > 1, (end[done] - first[done]) / (tokens - 1), np.nan)
    served = Served((first - arrival)[done], tpot, (end - arrival)[done], tokens)
    moved = (there - start)[~np.isnan(there)]
    transfers = KvTransfers(bytes=kv_bytes)
    if len(moved):
        transfers = KvTransfers(kv_bytes, float(moved.mean()), float(np.percentile(moved, 99)))
    results = Results(
        served=served,
        failed=int((~done).sum()),
        duration_s=float(end[done].max() - arrival[0]) if done.any() else 0.0,
        slo=slo,
        kv_transfer=transfers,
        per_group=per_group,
    )
    timeline = Timeline(
        arrival=arrival,
        prefilled=column("prefilled"),
        transfer_start=start,
        transferred=there,
        first=first,
        end=end,
        path=np.array([place.get(request.path, -1) for request in requests], dtype=np.int64),
        preemptions=np.array([request.preemptions for request in requests], dtype=np.int64),
        paths=tuple(paths),
    )
    return SimulationResult(results, timeline)
