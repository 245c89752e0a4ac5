"""The clusters of the test bed, and their engines' settings as the cost model must know them."""

from __future__ import annotations

from typing import Any

from hexgen2.cost import CostModel, Efficiencies, Settings
from hexgen2.specs.catalog import gpu_type
from hexgen2.specs.catalog.models import load_model
from hexgen2.specs.cluster import Cluster, parse_cluster
from hexgen2.specs.model import Model

MODEL = "tiny-llama"
WORKLOAD = "lpld"
"""Prompts of 8 to 498 tokens (357 in the mean), answers of 8 to 127 (85)."""

BLOCK = 32
"""Tokens of a KV block of an engine on a CPU."""

CORES = {"cpu-50": 0.5, "cpu-25": 0.25, "cpu-17": 0.17}
"""Parts of a core. The sum over a cluster leaves enough of two cores for the engines' HTTP servers, the
coordinator and the client."""

MEMORY_GIB = 0.28
"""What an engine may fill, so that its KV cache is within `EngineOptions.cpu_kv_cache_limit`."""


MAX_BATCH = 16
"""Sequences that an engine runs at once. More would serve a little more, but then a request takes ten seconds
and a run of half a minute never comes to a steady state."""

PEAK = 2.0
"""FLOP/s of a core beside the catalog's, which are what a benchmark got, not the most that it can do."""


def device(name: str) -> dict[str, Any]:
    """An entry of `gpu_types`: so much of the catalog's whole core."""
    core, part = gpu_type("cpu-1c"), CORES[name]
    return {
        "name": name,
        "vendor": "cpu",
        "generation": core.generation,
        "memory_gib": MEMORY_GIB,
        "dense_tflops": PEAK * core.flops * part / 1e12,
        "dense_dtype": core.dense_dtype,
        "memory_bandwidth_gb_s": core.memory_bandwidth * part / 1e9,
        "link": {"kind": "loopback", "gb_s": 2.5, "latency_us": 10},
    }


def cluster(
    name: str, nodes: dict[str, str], gbps: float, links: dict[tuple[str, str], float] | None = None
) -> Cluster:
    """A cluster of one device a node: type by node, rate of all links and of those that differ."""
    return parse_cluster(
        {
            "name": name,
            "gpu_types": [device(kind) for kind in dict.fromkeys(nodes.values())],
            "nodes": [{"name": node, "gpu": kind, "count": 1} for node, kind in nodes.items()],
            "network": {
                "default": {"gbps": gbps, "latency_ms": 0.05},
                "links": [
                    {"between": list(pair), "gbps": rate, "latency_ms": 0.05}
                    for pair, rate in (links or {}).items()
                ],
            },
        },
        name,
    )


LINK_BOUND = cluster(
    "link-bound",
    {"a": "cpu-25", "b": "cpu-25", "c": "cpu-25", "d": "cpu-25"},
    gbps=0.02,
    links={("a", "c"): 0.4, ("b", "d"): 0.4},
)
"""Four equal devices, two fast links; a KV cache takes 1.2 s on the others."""

COMPUTE_BOUND = cluster("compute-bound", {"a": "cpu-50", "b": "cpu-17", "c": "cpu-17", "d": "cpu-17"}, gbps=0.4)
"""Unlike devices, links that are fast enough."""


def served_model() -> Model:
    """The model as CPU engines run it: everything in float32."""
    return load_model(MODEL).model_copy(update={"weight_bytes": 4.0, "kv_bytes": 4.0, "activation_bytes": 4.0})


def cost_model(efficiencies: Efficiencies) -> CostModel:
    return CostModel(served_model(), efficiencies, Settings(block_size=BLOCK, max_batch=MAX_BATCH))
