"""The shipped catalog: GPU types, their prices, models and workloads, as YAML with sources and dates.

Read on first use, never at import. The figures are frozen values, so the cache is shared safely.
"""

from hexgen2.specs.catalog.gpus import gpu_price, gpu_prices, gpu_sources, gpu_type, gpu_type_names, parse_gpu_type

__all__ = ["gpu_price", "gpu_prices", "gpu_sources", "gpu_type", "gpu_type_names", "parse_gpu_type"]
