"""What the live page costs the coordinator: CPU time of one look at the metrics, and of one state for a reader.

    python benchmarks/live_page.py [--looks 200]

Figures are of this process's CPU, so other programs on the machine disturb them little.
"""

from __future__ import annotations

import argparse
import asyncio
import time

from hexgen2.coordinator import CoordinatorConfig, EngineEndpoint, RouteShare
from hexgen2.coordinator.admission import Admission, AdmissionLimits
from hexgen2.coordinator.fleet import Fleet
from hexgen2.coordinator.live import Live
from hexgen2.coordinator.live.view import document
from hexgen2.coordinator.metrics import Metrics


def live_of(pairs: int) -> Live:
    """The memory of a service of so many prefill and as many decode groups, all routes between them in use."""
    share = 1 / pairs
    engines = [
        EngineEndpoint(group_id=f"{letter}{n}", role=role, url=f"http://{letter}{n}", share=share, max_batch=64)
        for letter, role in (("p", "prefill"), ("d", "decode"))
        for n in range(pairs)
    ]
    ends = [(p, d) for p in range(pairs) for d in range(pairs)]
    routes = tuple(RouteShare(prefill=f"p{p}", decode=f"d{d}", share=share * share) for p, d in ends)
    config = CoordinatorConfig(served_model_names=("m",), engines=tuple(engines), routes=routes)
    fleet = Fleet(config)
    metrics = Metrics(fleet, Admission(fleet, AdmissionLimits(queue=1, wait_s=1.0, per_key=None)))
    for p, d in ends:
        metrics.routed.labels(f"p{p}", f"d{d}").inc(100)
    for d in range(pairs):
        for histogram in (metrics.ttft, metrics.tpot, metrics.e2e, metrics.leg_seconds):
            histogram.labels(f"d{d}", "decode").observe(0.1)
    return Live(fleet, metrics, lambda: config)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--looks", type=int, default=200)
    looks = parser.parse_args().looks
    print("groups  routes  look, ms  state with pictures, ms")
    for pairs in (3, 10, 40):
        live = live_of(pairs)
        began = time.process_time()
        for _ in range(looks):
            live.sample()
        looked = time.process_time()
        last = live.history.last
        assert last is not None
        for _ in range(looks):
            document(live, "ok", last.seq - 1, pictures=True)
        told = time.process_time()
        each = (1000 * (looked - began) / looks, 1000 * (told - looked) / looks)
        print(f"{2 * pairs:6}  {pairs * pairs:6}  {each[0]:8.2f}  {each[1]:23.2f}")


if __name__ == "__main__":
    asyncio.run(main())
