"""Engines on this machine to calibrate with: one group, started as `serve` starts it, without a coordinator."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from hexgen2.cost import Layout, PlacedStage, shape
from hexgen2.deploy import EngineOptions, LocalLauncher, check_engine, compile_plan, free_ports
from hexgen2.specs.cluster import parse_cluster
from hexgen2.specs.errors import InputError
from hexgen2.specs.model import Model
from hexgen2.specs.plan import Group, Objective, Plan, Stage, parse_plan

READY_TIMEOUT_S = 900.0
BATCH = 64


def one_group(gpu: str, model: Model, model_name: str, tp: int, pp: int) -> Plan:
    """A plan of a single colocated group of TP × PP devices of a type on this machine, layers split evenly.

    InputError where the model has fewer layers than stages.
    """
    if pp > model.layers:
        raise InputError(
            "--layout", "", f"{pp} stages but {model.layers} layers", f"use at most {model.layers} stages"
        )
    cluster = {
        "name": "this-machine",
        "nodes": [{"name": "local", "gpu": gpu, "count": tp * pp, "host": "127.0.0.1"}],
    }
    counts = [model.layers // pp + (place < model.layers % pp) for place in range(pp)]
    stages = [
        Stage(
            gpus=tuple(f"local/{place * tp + rank}" for rank in range(tp)),
            tp=tp,
            first_layer=sum(counts[:place]),
            layers=count,
        )
        for place, count in enumerate(counts)
    ]
    group = Group(
        id="c0",
        role="colocated",
        share=1.0,
        price_per_hour=0.0,
        capacity_rps=1.0,
        max_batch=BATCH,
        stages=tuple(stages),
    )
    document = {
        "version": 1,
        "cluster": parse_cluster(cluster, "--gpu").document(),
        "model": model_name,
        "workload": "calibration",
        "engine": "vllm",
        "solver": "none",
        "seed": 0,
        "objective": Objective(name="throughput", value=1.0, unit="requests/s").model_dump(),
        "throughput_rps": 1.0,
        "output_tokens_per_s": 1.0,
        "price_per_hour": 0.0,
        "wall_s": 0.0,
        "groups": [group.model_dump(mode="json")],
        "routes": [],
        "bottleneck": {"elements": [], "text": ""},
    }
    return parse_plan(document, "--layout")


def layout_of(plan: Plan, group_id: str = "c0") -> Layout:
    """The layout of one of a plan's groups."""
    index = plan.cluster.gpu_by_id
    group = plan.group_by_id[group_id]
    return shape(
        plan.cluster,
        tuple(
            PlacedStage(tuple(index[gpu].index for gpu in stage.gpus), stage.first_layer, stage.layers)
            for stage in group.stages
        ),
    )


@asynccontextmanager
async def running(plan: Plan, model: Model, run_directory: Path) -> AsyncIterator[str]:
    """The URL of the plan's only group, started here and stopped at the end.

    Prefix caching would only cost time: no prompt comes twice. Raises EngineFailed where it does not come up.
    """
    options = EngineOptions(extra_arguments=("--no-enable-prefix-caching",))
    deployment = compile_plan(plan, model, free_ports(), options, "--local")
    check_engine(plan.cluster.gpus[0].type.vendor, transfers=False)
    async with LocalLauncher(run_directory) as launcher:
        await launcher.start(deployment)
        await launcher.wait_ready(READY_TIMEOUT_S)
        yield deployment.coordinator.engines[0].url
