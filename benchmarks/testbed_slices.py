"""What pauses cost: the processor time of the same Python work in a part of a core, by the quota's period.

    sudo python benchmarks/testbed_slices.py [--part 0.35] [--periods 10 20 40 100] [--seconds 2.5]

A device of the test bed runs for its part of each period and then pauses. Whatever runs on the core meanwhile
takes the caches, so that the work needs more processor time, the more the shorter the turns are. The work is a
simulation of a few requests (0.7 ms without pauses), as much Python as vLLM's own. Without other work on the
machine there is little to see: run it beside some. Figures: docs/testbed.md.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from testbed_clusters import LINK_BOUND, WORKLOAD, cost_model
from testbed_plans import equal_plan

from hexgen2.cost import Efficiencies
from hexgen2.deploy.testbed import quotas, require_means
from hexgen2.simulator import offline, simulate
from hexgen2.specs.catalog.workloads import load_workload
from hexgen2.specs.errors import InputError

REQUESTS = 12


@contextmanager
def limited(part: float | None, period_ms: float) -> Iterator[None]:
    """This process in a group of its own, limited so."""
    controller = require_means()
    home = controller.group_of(Path("/proc/self/cgroup").read_text())
    group = controller.make(f"hxslices{os.getpid()}")
    try:
        controller.limit(group, part, round(1000 * period_ms))
        controller.favour(group)
        quotas.move([os.getpid()], group)
        yield
    finally:
        quotas.move([os.getpid()], home)
        quotas.remove(group)


def work_seconds(seconds: float) -> list[float]:
    """Processor seconds of each turn of the work, for so long."""
    roles = dict(zip("abcd", ("prefill", "decode", "decode", "colocated"), strict=True))
    cost = cost_model(Efficiencies())
    plan = equal_plan(LINK_BOUND, roles, WORKLOAD, cost)
    requests = offline(load_workload(WORKLOAD).sample(REQUESTS, np.random.default_rng(0)))
    found = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        began = time.thread_time()
        simulate(plan, cost, requests)
        found.append(time.thread_time() - began)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", type=float, default=0.35, help="of a core")
    parser.add_argument("--periods", type=float, nargs="+", default=[10, 20, 40, 100], help="milliseconds")
    parser.add_argument("--seconds", type=float, default=2.5, help="of each")
    arguments = parser.parse_args()
    try:
        print("| quota | processor time, ms: median | mean | of the work without a quota |\n|---|---|---|---|")
        whole = 0.0
        for period in (None, *arguments.periods):
            with limited(None if period is None else arguments.part, period or 100):
                found = work_seconds(arguments.seconds)
            mean = statistics.mean(found)
            whole = whole or mean
            name = "none" if period is None else f"{arguments.part:g} of each {period:g} ms"
            print(f"| {name} | {1e3 * statistics.median(found):.2f} | {1e3 * mean:.2f} | {mean / whole:.2f}× |")
        print(f"\nload average {os.getloadavg()[0]:.1f}")
    except InputError as error:
        print(f"benchmarks/testbed_slices.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
