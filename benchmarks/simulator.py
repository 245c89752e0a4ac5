"""What the simulator costs, by the number of requests, and how much of its planned rate a plan reaches.

    python benchmarks/simulator.py [--plan FILE] [--requests 10000 100000 1000000] [--load 0.75]
    python benchmarks/simulator.py --plan FILE --requests 8000 --load 1.5

Poisson arrivals at a part of the plan's rate, lengths of its workload; by default on the stored plan of
Llama-2-70B for the 20 GPUs of examples/clusters/mixed-1.yaml. The time per request should not grow. The rate
is that of the middle half of the requests.
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path

import numpy as np
from paper_measure import steady_rate

from hexgen2.cost import CostModel
from hexgen2.cost.profile_files import load_efficiencies
from hexgen2.simulator import poisson, simulate
from hexgen2.specs.catalog.models import load_model
from hexgen2.specs.catalog.workloads import load_workload
from hexgen2.specs.plan import load_plan

PLAN = Path(__file__).parent.parent / "tests" / "simulator" / "plan_20_gpus.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", default=str(PLAN))
    parser.add_argument("--requests", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--load", type=float, default=0.75)
    arguments = parser.parse_args()
    plan = load_plan(arguments.plan)
    cost = CostModel(load_model(plan.model), load_efficiencies(plan.profiles))
    workload = load_workload(plan.workload)
    for count in arguments.requests:
        rng = np.random.default_rng(0)
        requests = poisson(workload.sample(count, rng), arguments.load * plan.throughput_rps, rng)
        begin = time.process_time()
        result = simulate(plan, cost, requests)
        seconds = time.process_time() - begin
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(
            f"{count:9} requests: {seconds:7.1f} s of processor time, {seconds / count * 1e6:5.1f} µs each, "
            f"{most:.1f} GiB at most; {result.document()['completed']} completed, "
            f"{steady_rate(result.timeline.end) / plan.throughput_rps - 1:+.1%} of the planned rate",
            flush=True,
        )


if __name__ == "__main__":
    main()
