"""The coordinator's counters that a client's figures are completed with."""

from __future__ import annotations

from dataclasses import dataclass

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

_NAMES = {
    "hexgen2:kv_transfer_bytes_total": "bytes",
    "hexgen2:kv_transfer_seconds_total": "seconds",
    "hexgen2:kv_transfers_total": "transfers",
}


@dataclass(frozen=True)
class KvCounters:
    """KV caches moved since the engines started, summed over them."""

    bytes: float = 0.0
    seconds: float = 0.0
    transfers: float = 0.0


async def read_kv_counters(session: aiohttp.ClientSession, url: str) -> KvCounters | None:
    """The counters at ``url``/metrics; None where the endpoint is no coordinator of ours."""
    try:
        async with session.get(f"{url}/metrics", timeout=aiohttp.ClientTimeout(total=10)) as response:
            if response.status != 200:
                return None
            text = await response.text()
    except (aiohttp.ClientError, TimeoutError):
        return None
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = _NAMES.get(sample.name)
            if name:
                found[name] = found.get(name, 0.0) + sample.value
    return KvCounters(**found) if found else None
