"""The shipped catalog: GPU types, their prices, models and workloads, as YAML with sources and dates.

Read on first use, never at import. The figures are frozen values, so the cache is shared safely.
"""

from hexgen2.specs.catalog.gpus import (
    gpu_price,
    gpu_prices,
    gpu_sources,
    gpu_type,
    gpu_type_names,
    parse_gpu_type,
)
from hexgen2.specs.catalog.models import load_model, model_names
from hexgen2.specs.catalog.products import product_labels, type_of_product
from hexgen2.specs.catalog.workloads import load_workload, workload_names

__all__ = [
    "gpu_price",
    "gpu_prices",
    "gpu_sources",
    "gpu_type",
    "gpu_type_names",
    "load_model",
    "load_workload",
    "model_names",
    "parse_gpu_type",
    "product_labels",
    "type_of_product",
    "workload_names",
]
