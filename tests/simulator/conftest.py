"""Small plans on a round GPU type, and their cost model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from hexgen2.cost import CostModel, Settings
from hexgen2.specs import Model, Plan, parse_plan

GPU = {
    "name": "round",
    "vendor": "nvidia",
    "generation": "ampere",
    "memory_gib": 2,
    "dense_tflops": 10,
    "memory_bandwidth_gb_s": 200,
    "link": {"kind": "test", "gb_s": 10, "latency_us": 10},
}


@pytest.fixture
def model() -> Model:
    """8 layers, 32 kB of KV cache per token."""
    return Model(
        name="small",
        layers=8,
        hidden_size=1024,
        heads=8,
        kv_heads=8,
        head_dim=128,
        intermediate_size=2816,
        vocab_size=8000,
        max_positions=4096,
    )


@pytest.fixture
def cost(model: Model) -> CostModel:
    """Batches of at most 1000 tokens and 32 sequences."""
    return CostModel(model, settings=Settings(token_budget=1000, max_batch=32, runtime_bytes=0.0))


Group = tuple[str, str, float, int, list[tuple[int, int]]]
"""Id, role, share, largest batch, stages as (TP, layers)."""


@pytest.fixture
def make_plan() -> Callable[..., Plan]:
    """Builds a plan from groups and routes (from, to, share); each group on a node of its own."""

    def build(groups: list[Group], routes: Sequence[tuple[str, str, float]] = (), **extra: Any) -> Plan:
        nodes, found = [], []
        for name, role, share, max_batch, stages in groups:
            gpus = [f"{name}/{place}" for place in range(sum(tp for tp, _ in stages))]
            nodes.append({"name": name, "gpu": "round", "count": len(gpus), **extra.get("node", {})})
            parts, first_gpu, first_layer = [], 0, 0
            for tp, layers in stages:
                parts.append(
                    {
                        "gpus": gpus[first_gpu : first_gpu + tp],
                        "tp": tp,
                        "first_layer": first_layer,
                        "layers": layers,
                    }
                )
                first_gpu, first_layer = first_gpu + tp, first_layer + layers
            found.append(
                {
                    "id": name,
                    "role": role,
                    "share": share,
                    "price_per_hour": 0,
                    "capacity_rps": 0,
                    "max_batch": max_batch,
                    "stages": parts,
                }
            )
        return parse_plan(
            {
                "version": 1,
                "cluster": {
                    "nodes": nodes,
                    "network": {"default": {"gbps": extra.get("gbps", 80), "latency_ms": 0.1}},
                    "gpu_types": [GPU],
                },
                "model": "small",
                "workload": "test",
                "engine": "any",
                "solver": "hand",
                "seed": 0,
                "objective": {"name": "throughput", "value": 0, "unit": "requests/s"},
                "throughput_rps": 0,
                "output_tokens_per_s": 0,
                "price_per_hour": 0,
                "wall_s": 0,
                "groups": found,
                "routes": [
                    {"from": source, "to": target, "share": share, "rps": 0, "capacity_rps": 0}
                    for source, target, share in routes
                ],
                "bottleneck": {"elements": [], "text": ""},
            },
            "test",
        )

    return build
