"""A small valid plan document for the tests of this folder."""

from __future__ import annotations

from typing import Any

CLUSTER: dict[str, Any] = {
    "name": "two",
    "nodes": [
        {"name": "a", "gpu": "H100-80G-SXM", "count": 2, "nic_gbps": 100.0},
        {"name": "b", "gpu": "A6000", "count": 4},
    ],
    "network": {"default": {"gbps": 25.0, "latency_ms": 0.2}, "links": []},
}


def plan_document() -> dict[str, Any]:
    """Prefill on the H100s, decode on two stages of A6000s; a colocated group takes a tenth of the requests."""
    return {
        "version": 1,
        "cluster": CLUSTER,
        "model": "llama-2-13b",
        "workload": "hphd",
        "engine": "vllm-asymmetric",
        "solver": "hexgen2",
        "seed": 0,
        "objective": {"name": "throughput", "value": 2.0, "unit": "requests/s"},
        "throughput_rps": 2.0,
        "output_tokens_per_s": 500.0,
        "price_per_hour": 10.54,
        "upper_bound": 2.5,
        "gap": 0.2,
        "wall_s": 1.5,
        "groups": [
            group("p0", "prefill", 0.9, [stage(["a/0", "a/1"], 0, 40)]),
            group("d0", "decode", 0.9, [stage(["b/0", "b/1"], 0, 25), stage(["b/2"], 25, 15)]),
            group("c0", "colocated", 0.1, [stage(["b/3"], 0, 40)]),
        ],
        "routes": [{"from": "p0", "to": "d0", "share": 0.9, "rps": 1.8, "capacity_rps": 7.0}],
        "links": [{"from": "a", "to": "b", "bytes_per_s": 2e9, "use": 0.64}],
        "bottleneck": {"elements": ["d0"], "text": "decode d0 is full"},
        "shadow_prices": [
            {"resource": "d0", "kind": "group", "change": "a tenth more", "gain_rps": 0.5, "how": "dual"}
        ],
        "rejected": [{"rule": "vllm: decode without PP", "detail": "d0 with PP 2", "gain": 0.3, "group": "d0"}],
    }


def stage(gpus: list[str], first_layer: int, layers: int) -> dict[str, Any]:
    return {"gpus": gpus, "tp": len(gpus), "first_layer": first_layer, "layers": layers}


def group(name: str, role: str, share: float, stages: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": name,
        "role": role,
        "share": share,
        "price_per_hour": 3.0,
        "capacity_rps": 2.2,
        "max_batch": 16,
        "stages": stages,
        "runners_up": [{"role": "colocated", "layout": "1×A6000", "objective": 1.5, "loss": 0.25}],
    }
