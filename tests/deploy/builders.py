"""Small plans for the tests: clusters and groups in a few words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hexgen2.deploy import Deployment, EngineOptions, PortSource, ProcessSpec, compile_plan
from hexgen2.specs import Cluster, Group, Model, Plan, Role, Route, Stage, parse_cluster
from hexgen2.specs.plan import Bottleneck, Objective

MODEL = Model(
    name="toy",
    layers=8,
    hidden_size=256,
    heads=8,
    kv_heads=4,
    head_dim=32,
    intermediate_size=512,
    vocab_size=1024,
    max_positions=2048,
    location="/models/toy",
)


def cluster(*nodes: tuple[str, str, int] | Mapping[str, Any]) -> Cluster:
    """Nodes as (name, GPU type, count), or as the cluster file has them."""
    entries = [
        dict(node) if isinstance(node, Mapping) else {"name": node[0], "gpu": node[1], "count": node[2]}
        for node in nodes
    ]
    return parse_cluster({"name": "test", "nodes": entries, "network": {"default": {"gbps": 10}}}, "test")


def group(
    name: str, role: Role, *stages: tuple[Sequence[str], int], share: float = 1.0, max_batch: int = 8
) -> Group:
    """Stages as (GPUs, layers)."""
    built, first = [], 0
    for gpus, layers in stages:
        built.append(Stage(gpus=tuple(gpus), tp=len(gpus), first_layer=first, layers=layers))
        first += layers
    return Group(
        id=name,
        role=role,
        share=share,
        price_per_hour=0.0,
        capacity_rps=1.0,
        max_batch=max_batch,
        stages=tuple(built),
    )


def plan(devices: Cluster, groups: Sequence[Group], *routes: tuple[str, str, float], **fields: Any) -> Plan:
    """Routes as (prefill, decode, share)."""
    return Plan.model_validate(
        {
            "cluster": devices,
            "model": "toy",
            "workload": "hpld",
            "engine": "vllm",
            "solver": "paper",
            "seed": 0,
            "objective": Objective(name="throughput", value=1.0, unit="requests/s"),
            "throughput_rps": 1.0,
            "output_tokens_per_s": 1.0,
            "price_per_hour": 0.0,
            "wall_s": 0.0,
            "groups": tuple(groups),
            "routes": tuple(
                Route(source=source, target=target, share=share, rps=1.0, capacity_rps=1.0)
                for source, target, share in routes
            ),
            "bottleneck": Bottleneck(elements=(), text=""),
            **fields,
        }
    )


def numbered(first: int = 30_000) -> PortSource:
    """Ports as they would be handed out, without looking at this machine."""
    counter = iter(range(first, 65_536))

    def port(_host: str) -> int:
        return next(counter)

    return port


def compiled(a_plan: Plan, options: EngineOptions | None = None, model: Model = MODEL) -> Deployment:
    options = options or EngineOptions(run_id="run", python="python")
    return compile_plan(a_plan, model, numbered(), options)


def flag(process: ProcessSpec, name: str) -> str | None:
    """The value of an argument, '' for one without a value, None where it is not given."""
    if name not in process.argv:
        return None
    place = process.argv.index(name) + 1
    after = process.argv[place] if place < len(process.argv) else "--"
    return "" if after.startswith("--") else after
