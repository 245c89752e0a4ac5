"""Product names lead to the catalog's types."""

from __future__ import annotations

import pytest

from hexgen2.specs.catalog import gpu_type, gpu_type_names, product_labels, type_of_product
from hexgen2.specs.catalog.products import _products

GIB = 2**30


@pytest.mark.parametrize(
    ("name", "memory_gib", "expected"),
    [
        # Memory totals as NVML reports them on such cards.
        ("NVIDIA H100 80GB HBM3", 79.65, "H100-80G-SXM"),
        ("NVIDIA H100 PCIe", 79.65, "H100-80G-PCIe"),
        ("NVIDIA H200", 140.4, "H200-141G-SXM"),
        ("NVIDIA A100-SXM4-40GB", 40.0, "A100-40G-SXM"),
        ("NVIDIA A100 80GB PCIe", 80.0, "A100-80G-PCIe"),
        ("NVIDIA L40S", 45.0, "L40S"),
        ("NVIDIA L40", 45.0, "L40"),
        ("NVIDIA RTX A6000", 48.0, "A6000"),
        ("Tesla T4", 15.0, "T4"),
        ("Tesla V100-SXM2-32GB", 32.0, "V100-32G-SXM"),
        ("NVIDIA GeForce RTX 4090", 24.0, "RTX4090"),
        # Neighbours by name are other products.
        ("NVIDIA GeForce RTX 4090 D", 24.0, None),
        ("NVIDIA H200 NVL", 140.4, None),
        ("NVIDIA H100", 79.65, None),
        # The same name with other memory (rebuilt cards, MIG slices).
        ("NVIDIA GeForce RTX 4090", 48.0, None),
        ("NVIDIA A100-SXM4-80GB", 10.0, None),
    ],
)
def test_a_product_is_known_by_name_and_memory(name: str, memory_gib: float, expected: str | None) -> None:
    assert type_of_product(name, memory_gib * GIB) == expected


def test_every_type_but_the_cpus_has_a_product_and_no_name_two_types() -> None:
    assert set(_products()) == {name for name in gpu_type_names() if gpu_type(name).vendor != "cpu"}
    names = [name for product in _products().values() for name in product.names]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("kind", "label"),
    [
        ("H100-80G-SXM", "NVIDIA-H100-80GB-HBM3"),
        ("RTX3090", "NVIDIA-GeForce-RTX-3090"),
        ("MI300X", "AMD_Instinct_MI300X_OAM"),
    ],
)
def test_node_labels(kind: str, label: str) -> None:
    assert label in product_labels(kind)


def test_types_without_a_product_have_no_label() -> None:
    assert product_labels("cpu-1c") == product_labels("of-mine") == ()


@pytest.mark.parametrize("kind", [name for name in gpu_type_names() if gpu_type(name).vendor != "cpu"])
def test_labels_are_legal_in_kubernetes(kind: str) -> None:
    for label in product_labels(kind):
        assert len(label) <= 63
        assert label.replace("-", "").replace("_", "").replace(".", "").isalnum()
