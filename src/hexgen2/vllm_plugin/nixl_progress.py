"""Let NIXL's progress thread sleep between two looks at the network.

NIXL's Python API starts its progress thread with a delay of 0: it polls without a pause, one whole core per
worker for as long as the engine lives. On a machine with a core or two per engine that starves the model
itself. A pause of 1 ms costs a transfer at most that much and leaves the thread at about 1% of a core.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from hexgen2.vllm_plugin.compat import Reliance

PROGRESS_PAUSE_US = 1000

RELIES_ON = (
    Reliance(
        "vllm.distributed.kv_transfer.kv_connector.factory",
        "KVConnectorFactory.create_connector",
        ("config", "role", "kv_cache_config"),
    ),
)

logger = logging.getLogger("vllm.hexgen2")


def install() -> None:
    """Set the pause on every NIXL agent that a worker's KV connector makes from now on."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole

    original = KVConnectorFactory.create_connector

    @functools.wraps(original)
    def create_connector(config: Any, role: Any, kv_cache_config: Any) -> Any:
        if role == KVConnectorRole.WORKER:
            _patch_agent()
        return original(config, role, kv_cache_config)

    KVConnectorFactory.create_connector = staticmethod(create_connector)


def _patch_agent() -> None:
    # Not at registration: only workers need NIXL, and UCX's libraries should not be loaded before a fork.
    try:
        from nixl._api import nixlBind
    except ImportError:
        return  # another connector, which does without NIXL
    make_agent = nixlBind.nixlAgent
    if getattr(make_agent, "hexgen2", False):
        return
    if not hasattr(nixlBind.nixlAgentConfig(), "pthrDelay"):
        logger.error("hexgen2: NIXL's progress thread keeps polling, since its config has no pthrDelay")
        return

    def make_patient_agent(name: str, config: Any) -> Any:
        config.pthrDelay = PROGRESS_PAUSE_US
        return make_agent(name, config)

    make_patient_agent.hexgen2 = True  # type: ignore[attr-defined]
    nixlBind.nixlAgent = make_patient_agent
