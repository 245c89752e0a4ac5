"""The names that drivers and Kubernetes give to GPU types, from products.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import resources

import yaml

from hexgen2.specs.base import Spec
from hexgen2.specs.catalog.gpus import gpu_type

MEMORY_TOLERANCE = 0.15
"""A driver's total and the catalog's figure differ by the driver's own share and by ECC, a few percent; a card
with another amount of memory under the same name is another type."""


class Product(Spec):
    """``names`` as NVML reports them; ``labels`` where node labels are not those names."""

    names: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()


def type_of_product(name: str, memory_bytes: float) -> str | None:
    """The catalog's GPU type of a product with that much memory; None where it has none.

    >>> type_of_product("NVIDIA A100-SXM4-80GB", 80 * 2**30)
    'A100-80G-SXM'
    """
    for kind, product in _products().items():
        if name in product.names:
            expected = gpu_type(kind).memory_bytes
            return kind if abs(memory_bytes / expected - 1) <= MEMORY_TOLERANCE else None
    return None


def product_labels(kind: str) -> tuple[str, ...]:
    """The values that a Kubernetes node's product label may have for a GPU type; none where it is not known.

    >>> product_labels("A100-80G-PCIe")
    ('NVIDIA-A100-80GB-PCIe', 'A100-80GB-PCIe')
    """
    product = _products().get(kind, Product())
    return product.labels or tuple(name.replace(" ", "-") for name in product.names)


@cache
def _products() -> Mapping[str, Product]:
    text = resources.files("hexgen2.specs.catalog").joinpath("products.yaml").read_text(encoding="utf-8")
    return {kind: Product.model_validate(entry) for kind, entry in yaml.safe_load(text)["products"].items()}
