"""A simulation as a Chrome trace, to be opened in Perfetto (ui.perfetto.dev) or chrome://tracing."""

from __future__ import annotations

from typing import Any

import numpy as np

from hexgen2.simulator.result import SimulationResult


def chrome_trace(result: SimulationResult) -> dict[str, Any]:
    """The JSON object of a trace: a process for each group and route, a span for each request that used it.

    ``queue + prefill`` on a prefill group; ``transfer`` on a route, from the reservation of its blocks to its
    arrival; ``to first token`` and ``decode`` on the group that answers. Times in microseconds.
    """
    timeline = result.timeline
    events: list[dict[str, Any]] = []
    processes: dict[str, int] = {}

    def process(name: str) -> int:
        number = processes.get(name)
        if number is None:
            number = processes[name] = len(processes) + 1
            events.append({"ph": "M", "name": "process_name", "pid": number, "args": {"name": name}})
        return number

    def span(where: str, what: str, request: int, start: float, end: float) -> None:
        if np.isnan(start) or np.isnan(end):
            return
        # Asynchronous spans: those of one process may overlap.
        common = {"cat": what, "name": what, "id": request, "pid": process(where), "tid": 0}
        events.append({"ph": "b", "ts": start * 1e6, "args": {"request": request}, **common})
        events.append({"ph": "e", "ts": end * 1e6, **common})

    for request, place in enumerate(timeline.path.tolist()):
        if place < 0:
            continue
        path = timeline.paths[place]
        arrival, first = float(timeline.arrival[request]), float(timeline.first[request])
        ready = arrival
        if path.prefill is not None:
            ready = float(timeline.transferred[request])
            start = float(timeline.transfer_start[request])
            span(path.prefill, "queue + prefill", request, arrival, float(timeline.prefilled[request]))
            span(f"{path.prefill} → {path.target}", "transfer", request, start, ready)
        span(path.target, "to first token", request, ready, first)
        span(path.target, "decode", request, first, float(timeline.end[request]))
    return {"traceEvents": events, "displayTimeUnit": "ms"}
