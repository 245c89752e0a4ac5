"""Leave NIXL workers on all the cores that they may use.

On CPU vLLM's NIXL worker pins its thread, which is the model's thread, to the last core of each NUMA node, on
the assumption that OpenMP's threads are bound to the others. Where they are not bound
(`VLLM_CPU_OMP_THREADS_BIND=nobind`) every engine of the machine then computes on that one core while the
others idle.
"""

from __future__ import annotations

import functools
import os
from typing import Any

from hexgen2.vllm_plugin.compat import Reliance

RELIES_ON = (
    Reliance(
        "vllm.distributed.kv_transfer.kv_connector.factory",
        "KVConnectorFactory.create_connector",
        ("config", "role", "kv_cache_config"),
    ),
)


def install() -> None:
    """Give the thread back the cores it had before a KV connector was made."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    original = KVConnectorFactory.create_connector

    @functools.wraps(original)
    def create_connector(config: Any, role: Any, kv_cache_config: Any) -> Any:
        cores = os.sched_getaffinity(0)
        try:
            return original(config, role, kv_cache_config)
        finally:
            os.sched_setaffinity(0, cores)

    KVConnectorFactory.create_connector = staticmethod(create_connector)
