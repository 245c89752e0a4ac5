"""How UCX, under NIXL, is set wherever this project opens it: in engines and where links are measured."""

from __future__ import annotations

from collections.abc import MutableMapping

UCX_DEFAULTS = {
    # Without it UCX holds on to every unpinned registration for ever; vLLM sets it too.
    "UCX_RCACHE_MAX_UNRELEASED": "1024",
    # UCX carries a read over TCP in messages of this size. Its own 8 KiB reach a third of the rate
    # (benchmarks/kv_directions.py).
    "UCX_TCP_TX_SEG_SIZE": "64k",
    "UCX_TCP_RX_SEG_SIZE": "64k",
}


def set_ucx_defaults(environment: MutableMapping[str, str]) -> None:
    """Set what the user has not set. UCX looks once, when a process's first agent is made."""
    for name, value in UCX_DEFAULTS.items():
        environment.setdefault(name, value)
