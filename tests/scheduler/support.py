"""Small models, clusters and loads for the scheduler's tests, made by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from hexgen2.cost.replica import CostModel
from hexgen2.scheduler import PROFILES, Problem
from hexgen2.specs.cluster import Cluster, parse_cluster
from hexgen2.specs.model import MLA, Model, MoE
from hexgen2.specs.workload import Lengths

H100, A100, L40, A6000 = "H100-80G-SXM", "A100-80G-PCIe", "L40", "A6000"

SMALL = Model(
    name="small-16b",
    layers=12,
    hidden_size=8192,
    heads=64,
    kv_heads=8,
    head_dim=128,
    intermediate_size=28672,
    vocab_size=32000,
    max_positions=4096,
)
"""Layers of Llama-2-70B, but 12 of them: 20 GB of weights and 1 GB more, so that one or two GPUs hold it."""

LARGE = SMALL.model_copy(update={"name": "large-70b", "layers": 80})

MIXTURE = SMALL.model_copy(
    update={
        "name": "mixture",
        "hidden_size": 2048,
        "heads": 32,
        "head_dim": 64,
        "intermediate_size": 4096,
        "moe": MoE(experts=16, active=2, intermediate_size=2048, shared_intermediate_size=1024, dense_layers=2),
    }
)
LATENT = SMALL.model_copy(
    update={
        "name": "latent",
        "heads": 16,
        "kv_heads": 16,
        "mla": MLA(kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128),
    }
)


def cluster(
    *nodes: tuple[str, int], gbps: float = 25.0, links: dict[tuple[int, int], float] | None = None, **more: Any
) -> Cluster:
    """A cluster of (GPU type, count) nodes n0, n1, …; ``links`` by places of nodes in Gb/s."""
    return parse_cluster(
        {
            "name": "test",
            "nodes": [{"name": f"n{i}", "gpu": gpu, "count": count} for i, (gpu, count) in enumerate(nodes)],
            "network": {
                "default": {"gbps": gbps, "latency_ms": 0.2},
                "links": [
                    {"between": [f"n{a}", f"n{b}"], "gbps": speed, "latency_ms": 0.2}
                    for (a, b), speed in (links or {}).items()
                ],
            },
            **more,
        },
        "test cluster",
    )


def lengths(prompt: int = 1000, answer: int = 200, count: int = 32, seed: int = 0) -> Lengths:
    """Gamma-distributed lengths with these means (roughly), at most 3× as long."""
    rng = np.random.default_rng(seed)
    inputs = np.clip(rng.gamma(3, prompt / 3, count), 1, 3 * prompt).astype(np.int64)
    outputs = np.clip(rng.gamma(3, answer / 3, count), 1, 3 * answer).astype(np.int64)
    return Lengths(inputs, outputs)


def problem(
    where: Cluster,
    model: Model = SMALL,
    engine: str = "any",
    load: Lengths | None = None,
    **more: Any,
) -> Problem:
    """A problem with default costs."""
    return Problem(
        cluster=where,
        workload="test load",
        lengths=lengths() if load is None else load,
        cost=CostModel(model),
        engine=PROFILES[engine],
        **more,
    )


@st.composite
def clusters(draw: st.DrawFn, most_gpus: int = 8, most_nodes: int = 3) -> Cluster:
    """Random small clusters: up to 3 nodes of up to 4 GPUs of four types, links of 1 to 100 Gb/s."""
    count = draw(st.integers(1, most_nodes))
    nodes: list[tuple[str, int]] = []
    left = most_gpus
    for place in range(count):
        most = min(4, left - (count - place - 1))
        nodes.append((draw(st.sampled_from([H100, A100, L40, A6000])), draw(st.integers(1, most))))
        left -= nodes[-1][1]
    speeds = st.sampled_from([1.0, 5.0, 10.0, 25.0, 50.0, 100.0])
    links = {(a, b): draw(speeds) for b in range(count) for a in range(b)}
    return cluster(*nodes, gbps=draw(speeds), links=links)
