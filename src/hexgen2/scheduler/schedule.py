"""`schedule`: from a problem to a plan with the solver of the given name."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from hexgen2.scheduler import baselines, exhaustive, hexgen2, metis, paper
from hexgen2.scheduler.bound import upper_bound
from hexgen2.scheduler.classes import with_classes
from hexgen2.scheduler.evaluate import Evaluator, Option, Rule, best_rate, paper_rule
from hexgen2.scheduler.feasible import check_fits
from hexgen2.scheduler.layouts import StageTemplate
from hexgen2.scheduler.plan_build import Extras, build
from hexgen2.scheduler.prediction import predict
from hexgen2.scheduler.problem import Budget, Clock, Problem, ProgressCallback
from hexgen2.scheduler.solution import Cell, Solution, assemble
from hexgen2.scheduler.topology import canonical
from hexgen2.specs.errors import InputError
from hexgen2.specs.plan import Plan, Slo

Solver = Callable[[Problem, int, Budget], tuple[Solution, Evaluator, Extras]]
Search = Callable[[Problem, Evaluator, int, Budget], Solution]


def schedule(
    problem: Problem,
    *,
    solver: str = "hexgen2",
    seed: int = 0,
    time_limit_s: float | None = None,
    progress: ProgressCallback | None = None,
    clock: Clock = time.perf_counter,
    shadow: bool = False,
) -> Plan:
    """The plan that a solver finds; raises InputError when there is none.

    ``shadow``: search again with one GPU more of each type, for its shadow price.

    Without a time limit the plan depends on the problem, the solver and the seed alone (``wall_s`` apart).
    """
    try:
        run = SOLVERS[solver]
    except KeyError:
        raise InputError(
            "--solver", "", f"there is no solver {solver!r}", f"use one of {', '.join(SOLVERS)}"
        ) from None
    if len(problem.lengths) == 0:
        raise InputError(problem.workload, "", "the workload has no requests", "give one with at least one")
    notes = default_targets(problem)
    targets = problem.targets
    if targets is not None:
        problem = replace(problem, slo=Slo(ttft_s=targets.ttft_s, tpot_s=targets.tpot_s))
    if problem.init == "metis":
        metis.check_installed()
    budget = Budget(clock, time_limit_s, progress)
    sorted_problem = replace(problem, cluster=canonical(problem.cluster))
    solution, evaluator, extras = run(sorted_problem, seed, budget)
    plan = build(
        sorted_problem,
        problem.cluster,
        evaluator,
        solution,
        solver=solver,
        seed=seed,
        extras=replace(extras, notes=(*extras.notes, *notes)),
        shadow=shadow,
    )
    if solver in CLASS_SOLVERS:
        plan = with_classes(sorted_problem, plan)
    if problem.rate is not None:
        plan = plan.model_copy(update={"at_rate": predict(sorted_problem, plan, problem.rate)})
    return plan.model_copy(update={"wall_s": budget.spent_s})


def default_targets(problem: Problem) -> tuple[str, ...]:
    """What to tell of latency targets that goodput needs and nobody gave."""
    targets = problem.targets
    if targets is None:
        return ()
    found: list[str] = []
    for option, given, taken in (
        ("--slo-ttft", problem.slo.ttft_s, targets.ttft_s),
        ("--slo-tpot", problem.slo.tpot_s, targets.tpot_s),
    ):
        if given is None:
            found.append(f"no {option} was given: {taken:g} s was taken, MLPerf Inference's for Llama 2 70B")
    return tuple(found)


def _hexgen2(problem: Problem, seed: int, budget: Budget) -> tuple[Solution, Evaluator, Extras]:
    evaluator = hexgen2.evaluator_for(problem)
    check_fits(evaluator)
    found = hexgen2.search(problem, evaluator, seed, budget)
    bound = upper_bound(evaluator)
    solution, evaluator = hexgen2.finished(evaluator, found, bound.starts, budget)
    return solution, evaluator, Extras(upper_bound=bound.value)


def _exhaustive(problem: Problem, seed: int, budget: Budget) -> tuple[Solution, Evaluator, Extras]:
    del seed  # there is nothing to draw
    evaluator = Evaluator(problem, best_rate)
    check_fits(evaluator)
    best = exhaustive.optimum(problem, budget)
    cells: list[Cell] = []
    options: list[Option] = []
    for choice in best.choices:
        template = tuple(
            StageTemplate(tuple((node, count) for node, count in enumerate(part) if count), layers)
            for part, layers in choice.stages
        )
        members = tuple((node, count) for node, count in enumerate(choice.vector) if count)
        cells.append(Cell(members, choice.role, template))
        options.append(
            Option(choice.role, template, choice.rps, choice.max_batch, choice.latency_s, queue=choice.queue)
        )
    extras = Extras(upper_bound=best.value)
    if not best.proven:
        note = "--time-limit ended the search before every plan was looked at; better ones may exist"
        extras = Extras(upper_bound=upper_bound(evaluator).value, notes=(note,))
    return assemble(evaluator, cells, options), evaluator, extras


def _baseline(search: Search, rule: Rule) -> Solver:
    """A solver from a search over one evaluator that counts each route by itself, as the paper does.

    What its plan carries in the end is valued like every other plan's: with links and NICs shared.
    """

    def run(problem: Problem, seed: int, budget: Budget) -> tuple[Solution, Evaluator, Extras]:
        evaluator = Evaluator(problem, rule)
        check_fits(evaluator)
        found = search(problem, evaluator, seed, budget)
        extras = Extras(upper_bound=upper_bound(evaluator).value, counted_singly=True)
        return found, evaluator, extras

    return run


CLASS_SOLVERS = ("hexgen2", "exhaustive")
"""Solvers whose plans may route request classes differently: those that go past the paper."""
SOLVERS: dict[str, Solver] = {
    "hexgen2": _hexgen2,
    "paper": _baseline(paper.search, paper_rule),
    "exhaustive": _exhaustive,
    "distserve": _baseline(baselines.distserve, best_rate),
    "distserve-pairs": _baseline(baselines.distserve_pairs, best_rate),
    "hexgen": _baseline(baselines.hexgen, best_rate),
    "colocated": _baseline(baselines.colocated, best_rate),
    "genetic": _baseline(baselines.genetic, paper_rule),
    "random-swap": _baseline(baselines.random_swap, paper_rule),
}
