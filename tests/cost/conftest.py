"""Small models and GPU types with round figures, so that expected values can be worked out by hand."""

from __future__ import annotations

import pytest

from hexgen2.cost import CostModel, Efficiencies, Efficiency, Profile, Settings
from hexgen2.specs import GIB, GpuType, Link, Model


@pytest.fixture
def gpu() -> GpuType:
    """1 TFLOP/s, 100 GB/s, 10 GiB; the link 10 GB/s and 10 µs."""
    return GpuType(
        name="round",
        vendor="nvidia",
        generation="ampere",
        memory_bytes=10 * GIB,
        flops=1e12,
        dense_dtype="bf16",
        memory_bandwidth=100e9,
        link_kind="test",
        link=Link(bandwidth=10e9, latency=10e-6),
    )


@pytest.fixture
def model() -> Model:
    """4 layers of H = 1000: attention 2·10⁶ + 2·0.5·10⁶ weights, MLP 3·2·10⁶; 9·10⁶ a layer, 18 MB."""
    return Model(
        name="round",
        layers=4,
        hidden_size=1000,
        heads=8,
        kv_heads=4,
        head_dim=125,
        intermediate_size=2000,
        vocab_size=10000,
        max_positions=4096,
    )


@pytest.fixture
def full_speed() -> Efficiency:
    """The data sheet reached, without overheads."""
    return Efficiency(
        compute=1.0, attention=1.0, memory=1.0, kv=1.0, link=1.0, layer_overhead_s=0.0, step_overhead_s=0.0
    )


@pytest.fixture
def efficiencies(full_speed: Efficiency) -> Efficiencies:
    """The round GPU type at full speed."""
    gpus = {"round": full_speed}
    return Efficiencies([Profile(name="exact", source="test", date="2026-01-01", engine="none", gpus=gpus)])


@pytest.fixture
def exact(model: Model, efficiencies: Efficiencies) -> CostModel:
    """The round model at the full data-sheet speed, with batches of at most 8 and 1000 tokens."""
    settings = Settings(runtime_bytes=0.0, communicator_bytes=0.0, token_budget=1000, max_batch=8)
    return CostModel(model, efficiencies, settings)
