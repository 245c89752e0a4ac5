"""Whether a model fits, how much memory is lacking when not, and the messages that say so."""

from __future__ import annotations

from math import ceil, floor, inf, log10

from hexgen2.cost.goodput import ATTAINMENT
from hexgen2.scheduler.columns import Kinds, part_lists
from hexgen2.scheduler.evaluate import Evaluator
from hexgen2.scheduler.layouts import layout_of, templates
from hexgen2.scheduler.problem import Problem
from hexgen2.specs.errors import InputError
from hexgen2.specs.gpu import GIB


def need_bytes(problem: Problem) -> float:
    """Memory that one replica needs at least: all weights and the KV cache of the longest request."""
    model = problem.model
    longest = int((problem.lengths.inputs + problem.lengths.outputs).max())
    return model.total_params * model.weight_bytes + longest * model.kv_bytes_per_token


def missing_bytes(evaluator: Evaluator) -> float:
    """Memory lacking for one replica over the whole cluster; 0 when some group of all GPUs holds one.

    The least over the layouts of all GPUs together; where none can be laid out, the need less all memory.
    """
    problem = evaluator.problem
    longest = int((problem.lengths.inputs + problem.lengths.outputs).max())
    everything = evaluator.topology.everything
    usable = evaluator.topology.memory_of(everything) * problem.cost.settings.memory_utilisation
    lacking = max(0.0, need_bytes(problem) - usable)
    if lacking > 0:
        return lacking
    found = [
        problem.cost.missing_bytes(layout_of(evaluator.topology, template), longest)
        for template in templates(evaluator.values, everything, evaluator.sizes)
    ]
    return min(found, default=0.0)


def check_fits(evaluator: Evaluator) -> None:
    """Raise InputError when even all memory of the cluster together is too little for one replica."""
    problem = evaluator.problem
    everything = evaluator.topology.memory_of(evaluator.topology.everything)
    missing = need_bytes(problem) - everything * problem.cost.settings.memory_utilisation
    if missing > 0:
        raise _does_not_fit(evaluator, missing)


def _does_not_fit(evaluator: Evaluator, missing: float) -> InputError:
    problem = evaluator.problem
    total = evaluator.topology.memory_of(evaluator.topology.everything)
    return InputError(
        problem.place,
        "nodes",
        f"{problem.model.name} does not fit: one replica needs {need_bytes(problem) / GIB:.1f} GiB, "
        f"the cluster's {total / GIB:.1f} GiB lack at least {missing / GIB:.2f} GiB",
        "add GPUs, or take a smaller or quantised model",
    )


def no_disaggregation(evaluator: Evaluator) -> InputError:
    """Why there is no plan with at least one prefill and one decode group."""
    problem = evaluator.problem
    late = out_of_reach(evaluator)
    if late is not None:
        return late
    usable = evaluator.topology.memory_of(evaluator.topology.everything)
    usable *= problem.cost.settings.memory_utilisation
    need = need_bytes(problem)
    if usable < 2 * need:
        return InputError(
            problem.place,
            "nodes",
            "prefill and decode need a replica each: 2 replicas need "
            f"{2 * need / GIB:.1f} GiB, {(2 * need - usable) / GIB:.2f} GiB more than is usable",
            "add GPUs, or use a solver with colocated groups (--solver hexgen2)",
        )
    return InputError(
        problem.place,
        "nodes",
        f"no two groups that the engine profile {problem.engine.name!r} can run hold {problem.model.name}",
        "use nodes with more GPUs each, another --engine, or a solver with colocated groups (--solver hexgen2)",
    )


def out_of_reach(evaluator: Evaluator) -> InputError | None:
    """Which latency target no group meets even with one request at a time, and what the fastest reaches; None
    where there are no targets or no group at all."""
    targets = evaluator.targets
    if targets is None:
        return None
    kinds = Kinds(evaluator.topology)
    groups = [kinds.best_nodes(parts) for parts in part_lists(evaluator, kinds)]
    reached = [evaluator.fastest(members) for members in groups if members is not None]
    first = min((seconds for seconds, _ in reached), default=inf)
    steady = min((seconds for _, seconds in reached), default=inf)
    if steady == inf:
        return None
    if steady > targets.tpot_s:
        return InputError(
            "--slo-tpot",
            "",
            f"no group gives a token every {targets.tpot_s:g} s: the fastest, alone with one request, "
            f"takes {steady:.3g} s",
            f"ask for at least {_rounded_up(steady):g}, or add faster GPUs",
        )
    if first > targets.ttft_s:
        return InputError(
            "--slo-ttft",
            "",
            f"no group computes {ATTAINMENT:.0%} of the prompts in {targets.ttft_s:g} s: the fastest, alone "
            f"with one request, takes {first:.3g} s",
            f"ask for at least {_rounded_up(first):g}, or add faster GPUs",
        )
    return InputError(
        "--slo-ttft",
        "",
        f"{targets.ttft_s:g} s to the first token and {targets.tpot_s:g} s a token are not met together by any "
        f"plan that the solver may make (singly the fastest groups reach {first:.3g} s and {steady:.3g} s): "
        "prompts hold up decoding on one group, KV caches take time between two",
        "ask for less",
    )


def _rounded_up(seconds: float) -> float:
    """To two digits."""
    unit = 10.0 ** (floor(log10(seconds)) - 1)
    return round(ceil(seconds / unit) * unit, 9)


def no_plan(evaluator: Evaluator) -> InputError:
    """Why there is no plan at all although one replica's bytes would fit into all memory together."""
    problem = evaluator.problem
    missing = missing_bytes(evaluator)
    if missing > 0:
        return _does_not_fit(evaluator, missing)
    late = out_of_reach(evaluator)
    if late is not None:
        return late
    return InputError(
        problem.place,
        "nodes",
        f"no group that the engine profile {problem.engine.name!r} can run holds {problem.model.name}",
        "use nodes with more GPUs each, or another --engine",
    )
