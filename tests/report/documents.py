"""A small plan document for the tests of this folder."""

from __future__ import annotations

from typing import Any


def plan_document() -> dict[str, Any]:
    def stage(gpus: list[str], first: int, layers: int) -> dict[str, object]:
        return {"gpus": gpus, "tp": len(gpus), "first_layer": first, "layers": layers}

    def group(
        name: str, role: str, share: float, capacity: float, stages: list[dict[str, object]]
    ) -> dict[str, object]:
        price = {"id": name, "role": role, "share": share, "price_per_hour": 3.0, "capacity_rps": capacity}
        return {**price, "max_batch": 8, "stages": stages}

    return {
        "version": 1,
        "cluster": {
            "name": "two",
            "nodes": [
                {"name": "a", "gpu": "H100-80G-SXM", "count": 4},
                {"name": "b", "gpu": "A100-80G-PCIe", "count": 4},
            ],
            "network": {"default": {"gbps": 25}},
        },
        "model": "llama-2-70b",
        "workload": "hphd",
        "engine": "any",
        "solver": "paper",
        "seed": 0,
        "objective": {"name": "throughput", "value": 4.0, "unit": "requests/s"},
        "throughput_rps": 4.0,
        "output_tokens_per_s": 800.0,
        "price_per_hour": 20.0,
        "wall_s": 0.5,
        "groups": [
            group("p0", "prefill", 0.75, 3.1, [stage(["b/0", "b/1"], 0, 80)]),
            group("d0", "decode", 0.75, 5.0, [stage(["a/0", "a/1"], 0, 50), stage(["b/2"], 50, 30)]),
            group("c0", "colocated", 0.25, 1.0, [stage(["a/2", "a/3"], 0, 80)]),
        ],
        "routes": [{"from": "p0", "to": "d0", "share": 0.75, "rps": 3.0, "capacity_rps": 9.0}],
        "bottleneck": {"elements": ["p0"], "text": "prefill p0 is full"},
    }
