"""The default solver against the exhaustive one, its own promises, and the master program it starts from."""

from __future__ import annotations

import random

import numpy as np
import pytest

from hexgen2.scheduler import Problem, schedule
from hexgen2.scheduler.columns import Kinds, columns
from hexgen2.scheduler.evaluate import Evaluator, best_rate
from hexgen2.scheduler.master import best_counts, counted_value, program, relaxed_value
from hexgen2.scheduler.starts import placed
from hexgen2.specs.cluster import Cluster, parse_cluster
from hexgen2.specs.errors import InputError
from tests.scheduler.checks import check_plan
from tests.scheduler.support import A100, A6000, H100, L40, LARGE, SMALL, cluster, lengths, problem

LLAMA = SMALL.model_copy(update={"name": "llama-8-layers", "layers": 8, "weight_bytes": 10.0})
OPT = SMALL.model_copy(
    update={"name": "opt-6-layers", "layers": 6, "hidden_size": 7168, "heads": 56, "kv_heads": 56}
    | {"gated_mlp": False, "vocab_size": 50272, "weight_bytes": 8.0}
)
LOADS = [(1500, 100), (300, 300), (1000, 200), (2000, 30)]


def random_cluster(seed: int, most: int) -> Cluster:
    """Up to three nodes of up to four GPUs, up to three types, every link at random."""
    draw = random.Random(seed)
    count = draw.randint(1, 3)
    types = draw.sample([H100, A100, L40, A6000], 3)
    nodes, left = [], most
    for place in range(count):
        gpus = draw.randint(1, min(4, left - (count - 1 - place)))
        left -= gpus
        nodes.append({"name": f"n{place}", "gpu": draw.choice(types), "count": gpus})
    links = [
        {
            "between": [f"n{a}", f"n{b}"],
            "gbps": draw.choice([1, 5, 10, 25, 50, 100]),
            "latency_ms": draw.choice([0.05, 0.2, 0.5]),
        }
        for b in range(count)
        for a in range(b)
    ]
    return parse_cluster(
        {"nodes": nodes, "network": {"default": {"gbps": 10}, "links": links}}, f"random {seed}"
    )


def random_problem(seed: int, most: int) -> Problem:
    model = (LLAMA, OPT)[seed % 2]
    if seed % 4 >= 2:  # heavier: groups need several GPUs, and KV caches fill the network
        model = model.model_copy(update={"weight_bytes": 2.5 * model.weight_bytes, "kv_bytes": 4.0})
    load = lengths(*LOADS[seed // 2 % 4], seed=seed)
    return problem(random_cluster(seed, most), model, ("any", "vllm")[seed // 3 % 2], load)


def ratio(seed: int, most: int) -> float | None:
    """The search's value over the optimum's; None where nothing fits."""
    task = random_problem(seed, most)
    try:
        best = schedule(task, solver="exhaustive")
    except InputError:
        with pytest.raises(InputError):
            schedule(task, solver="hexgen2")
        return None
    found = schedule(task, solver="hexgen2")
    assert found.upper_bound is not None
    assert best.objective.value <= found.upper_bound, "the bound is below the optimum"
    check_plan(best, task.model, task.lengths)
    check_plan(found, task.model, task.lengths)
    return found.objective.value / best.objective.value


def assert_close(ratios: list[float]) -> None:
    assert max(ratios) <= 1 + 1e-6, "nothing beats the exhaustive solver"
    assert min(ratios) >= 0.98
    assert sum(value > 1 - 1e-6 for value in ratios) >= 0.95 * len(ratios)


def test_equals_the_exhaustive_optimum_on_small_clusters() -> None:
    assert_close([value for seed in range(24) if (value := ratio(seed, 5)) is not None])


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_equals_the_exhaustive_optimum_on_200_clusters() -> None:
    assert_close([value for seed in range(1000, 1200) if (value := ratio(seed, 8)) is not None])


def mixed(engine: str = "vllm", load: tuple[int, int] = (1200, 250)) -> Problem:
    where = cluster((H100, 2), (A100, 4), (L40, 4), (A6000, 4), gbps=10, links={(0, 1): 50, (0, 2): 25})
    return problem(where, LARGE, engine, lengths(*load))


@pytest.mark.parametrize("engine", ["vllm", "any"])
def test_never_below_the_best_colocated_start(engine: str) -> None:
    task = mixed(engine)
    evaluator = Evaluator(task, best_rate)
    kinds = Kinds(evaluator.topology)
    alone = columns(evaluator, kinds, ("colocated",))
    counts = best_counts(program(kinds, alone, 1.0))
    assert counts is not None
    cells = placed(kinds, alone, counts)
    colocated = sum(option.rps for cell in cells if (option := evaluator.choose(cell.members, cell.role)))
    plan = schedule(task)
    check_plan(plan, LARGE, task.lengths)
    assert plan.objective.value >= colocated * (1 - 1e-6)


def test_the_same_seed_gives_the_same_plan() -> None:
    first, second = (schedule(mixed(), seed=3).document() for _ in range(2))
    first["wall_s"] = second["wall_s"] = 0
    assert first == second


def test_more_time_never_makes_it_worse() -> None:
    ticks = iter(range(10**6))
    short = schedule(mixed())
    longer = schedule(mixed(), time_limit_s=3000, clock=lambda: float(next(ticks)))
    assert longer.objective.value >= short.objective.value * (1 - 1e-9)


def test_one_replica_is_served_colocated() -> None:
    task = problem(cluster((A100, 3)), LARGE)
    plan = schedule(task)
    assert [group.role for group in plan.groups] == ["colocated"]
    assert plan.routes == ()
    check_plan(plan, LARGE, task.lengths)


def test_too_many_gpus_for_looking_at_every_plan() -> None:
    with pytest.raises(InputError, match="too many to look at every plan"):
        schedule(problem(cluster((A100, 8), (A100, 4))), solver="exhaustive")


@pytest.mark.parametrize("keep", [None, 30])
def test_master_finds_whole_numbers_that_fit_and_stay_below_its_relaxation(keep: int | None) -> None:
    task = mixed()
    evaluator = Evaluator(task, best_rate)
    kinds = Kinds(evaluator.topology)
    found = columns(evaluator, kinds)
    master = program(kinds, found, float(task.lengths.inputs.mean()) * LARGE.kv_bytes_per_token)
    whole = best_counts(master, keep)
    assert whole is not None
    gpus = np.zeros(len(kinds.nodes))
    for column, count in zip(found, whole, strict=True):
        for kind, size in column.parts:
            gpus[kind] += count * size
    assert np.all(gpus <= [len(nodes) * kinds.count(kind) for kind, nodes in enumerate(kinds.nodes)])
    value = counted_value(found, whole)
    assert 0.8 * relaxed_value(master) <= value <= relaxed_value(master) * (1 + 1e-6)
    assert best_counts(master, keep, above=relaxed_value(master)) is None
    more = best_counts(master, keep, above=0.9 * value)
    assert more is not None
    assert counted_value(found, more) > 0.9 * value
