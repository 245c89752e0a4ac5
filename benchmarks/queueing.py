"""Goodput of single groups: the closed forms of `cost.goodput` against the discrete-event simulator.

    python benchmarks/queueing.py [--requests N] [-o FILE]

For each group, model, workload and pair of targets: the predicted highest rate at which enough requests meet
the targets, and the rate at which as many do in simulation (bisection; the same arrivals at every rate,
squeezed in time). Prints the table of docs/cost-model.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from hexgen2.cost import CostModel, StageShape
from hexgen2.cost.goodput import (
    ATTAINMENT,
    PHASE_ATTAINMENT,
    Targets,
    colocated_goodput,
    decode_goodput,
    prefill_goodput,
)
from hexgen2.cost.layout import Layout
from hexgen2.cost.queues import prompt_queue
from hexgen2.simulator.batching import Engine
from hexgen2.simulator.events import Events
from hexgen2.simulator.prefill import PrefillGroup
from hexgen2.simulator.sequence import Sequence
from hexgen2.specs.catalog.gpus import gpu_type
from hexgen2.specs.catalog.models import load_model
from hexgen2.specs.catalog.workloads import load_workload
from hexgen2.specs.gpu import Link
from hexgen2.specs.workload import FloatArray, Lengths

SKIP = 0.2
"""Part of the requests at either end of a run that is not counted: the group fills up and empties there."""


@dataclass(frozen=True)
class Case:
    """A group: GPUs per stage, stages, what it serves, and the targets."""

    role: str
    gpu: str
    tp: int
    stages: int
    model: str
    workload: str
    ttft_s: float
    tpot_s: float


CASES = [
    *(
        Case("prefill", gpu, tp, stages, model, workload, ttft, 0.2)
        for gpu, tp, stages, model in (
            ("H100-80G-SXM", 4, 1, "llama-2-70b"),
            ("A100-80G-PCIe", 4, 2, "llama-2-70b"),
            ("A100-80G-PCIe", 1, 3, "llama-2-70b"),
            ("A6000", 2, 4, "llama-2-70b"),
            ("L40", 2, 1, "llama-2-13b"),
        )
        for workload in ("hphd", "lpld", "hpld")
        for ttft in (0.5, 1.0, 2.0, 5.0)
    ),
    *(
        Case("decode", gpu, tp, stages, model, workload, 2.0, tpot)
        for gpu, tp, stages, model in (
            ("H100-80G-SXM", 4, 1, "llama-2-70b"),
            ("A100-80G-PCIe", 2, 2, "llama-2-70b"),
            ("L40", 2, 1, "llama-2-13b"),
        )
        for workload in ("hphd", "lpld", "hpld")
        for tpot in (0.03, 0.05, 0.1)
    ),
    *(
        Case("colocated", gpu, tp, stages, model, workload, ttft, tpot)
        for gpu, tp, stages, model in (
            ("H100-80G-SXM", 4, 1, "llama-2-70b"),
            ("A100-80G-PCIe", 4, 2, "llama-2-70b"),
            ("L40", 2, 1, "llama-2-13b"),
        )
        for workload in ("hphd", "lpld", "hpld")
        for ttft, tpot in ((0.5, 0.05), (1.0, 0.05), (1.0, 0.1), (2.0, 0.1), (2.0, 0.2))
    ),
]


def layout_of(case: Case, layers: int) -> Layout:
    """Equal stages, joined by 25 Gb/s."""
    gpu = gpu_type(case.gpu)
    between = Link(bandwidth=25e9 / 8, latency=2e-4)
    parts = np.diff(np.linspace(0, layers, case.stages + 1).astype(int))
    link = gpu.link if case.tp > 1 else None
    return tuple(
        StageShape(gpu, case.tp, int(part), link, between if place else None)
        for place, part in enumerate(parts)
    )


def predicted(case: Case, cost: CostModel, layout: Layout, lengths: Lengths) -> tuple[float, float, int]:
    """(goodput, throughput, largest batch) by the closed forms."""
    of, moments = cost.compiled(layout), cost.moments(lengths)
    if case.role == "prefill":
        prefill = cost.prefill_capacity(layout, lengths)
        queue = prompt_queue(of.costs, moments, prefill.batch_requests, cost.settings)
        found = prefill_goodput(queue, prefill.rps, case.ttft_s)
        return found, prefill.rps, prefill.max_batch
    if case.role == "decode":
        decode = cost.decode_capacity(layout, lengths, case.tpot_s)
        return decode_goodput(decode, of.costs, moments), decode.rps, decode.max_batch
    both = cost.colocated_capacity(layout, lengths, case.tpot_s)
    targets = Targets(case.ttft_s, case.tpot_s)
    return colocated_goodput(both, of.costs, moments, cost.settings, targets), both.rps, both.max_batch


def simulated(
    case: Case, cost: CostModel, layout: Layout, lengths: Lengths, batch: int, rate: float, gaps: FloatArray
) -> float:
    """Part of the requests that meet the targets at a rate."""
    events = Events()
    of = cost.compiled(layout)
    sequences = [
        Sequence(number, int(i), int(o), float(at))
        for number, (i, o, at) in enumerate(
            zip(lengths.inputs, lengths.outputs, np.cumsum(gaps) / rate, strict=True)
        )
    ]
    submit: Callable[[Sequence], None]
    if case.role == "prefill":
        group = PrefillGroup(events, of, cost.settings, batch, lambda sequence: group.release(sequence))
        submit = group.submit
    else:

        def fetch(sequence: Sequence) -> None:
            sequence.transfer_start = sequence.transferred = events.now
            events.at(events.now, engine.arrived, sequence)

        def done(sequence: Sequence) -> None:
            sequence.end = events.now

        decode = case.role == "decode"
        engine = Engine(events, of, cost.settings, batch, done, fetch if decode else None)

        def submit(sequence: Sequence) -> None:
            sequence.pending = 0 if decode else sequence.inputs
            engine.submit(sequence)

    for sequence in sequences:
        events.at(sequence.arrival, submit, sequence)
    while events.step():
        pass
    ends = int(len(sequences) * SKIP)
    counted = sequences[ends : len(sequences) - ends]
    return float(np.mean([_meets(case, sequence) for sequence in counted]))


def _meets(case: Case, sequence: Sequence) -> bool:
    if case.role == "prefill":
        return sequence.prefilled - sequence.arrival <= case.ttft_s
    gaps = sequence.outputs - 1
    steady = gaps == 0 or (sequence.end - sequence.first) / gaps <= case.tpot_s
    if case.role == "decode":
        return steady and sequence.transfer_start - sequence.arrival < case.tpot_s
    return steady and sequence.first - sequence.arrival <= case.ttft_s


def highest_rate(case: Case, cost: CostModel, layout: Layout, batch: int, most: float, requests: int) -> float:
    """The rate at which the stated part of the requests meet the targets in simulation."""
    needed = ATTAINMENT if case.role == "colocated" else PHASE_ATTAINMENT
    rng = np.random.default_rng(7)
    lengths = load_workload(case.workload).sample(requests, rng)
    gaps = rng.exponential(1.0, size=requests)

    def met(rate: float) -> float:
        return simulated(case, cost, layout, lengths, batch, rate, gaps)

    low, high = 0.0, most * 1.2
    for _ in range(9):
        middle = (low + high) / 2
        low, high = (middle, high) if met(middle) >= needed else (low, middle)
    return (low + high) / 2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--role", choices=("prefill", "decode", "colocated"))
    parser.add_argument("-o", "--output")
    args = parser.parse_args()
    rows = []
    print("| role | group | model | workload | TTFT | TPOT | throughput | predicted | simulated | ratio |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for case in CASES:
        if args.role and case.role != args.role:
            continue
        cost = CostModel(load_model(case.model))
        layout = layout_of(case, cost.model.layers)
        lengths = load_workload(case.workload).representative(256)
        began = time.perf_counter()
        rate, throughput, batch = predicted(case, cost, layout, lengths)
        took = time.perf_counter() - began
        measured = (
            highest_rate(case, cost, layout, max(1, batch), throughput, args.requests) if throughput else 0.0
        )
        ratio = rate / measured if measured > 0.01 * throughput else float("nan")
        rows.append(
            asdict(case) | {"predicted": rate, "simulated": measured, "throughput": throughput, "s": took}
        )
        print(
            f"| {case.role} | {case.stages}×TP{case.tp} {case.gpu} | {case.model} | {case.workload} | "
            f"{case.ttft_s:g} s | {case.tpot_s * 1e3:.0f} ms | {throughput:.3g} | {rate:.3g} | "
            f"{measured:.3g} | {ratio:.2f} |",
            flush=True,
        )
    if args.output:
        Path(args.output).write_text(json.dumps(rows, indent=1) + "\n")
    print(f"mean time of a prediction: {1e3 * np.mean([row['s'] for row in rows]):.2f} ms", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
