"""How much KV cache the engines have moved, as they count it themselves.

vLLM's NIXL connector and ours count on the engine that receives. The counters follow a transfer with its
next step, so an engine that falls idle may show its last transfer only with the next request.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import aiohttp

_LINE = re.compile(r'^(vllm:[a-z_]+)(?:\{(?:[^"}]|"(?:\\.|[^"\\])*")*\})?\s+(\S+)', re.MULTILINE)

_FIELDS = {
    "vllm:nixl_bytes_transferred_sum": "bytes",
    "vllm:nixl_bytes_transferred_count": "transfers",
    "vllm:nixl_xfer_time_seconds_sum": "seconds",
    "vllm:nixl_num_failed_transfers_total": "failed",
    "vllm:nixl_num_kv_expired_reqs_total": "expired",
    "vllm:hexgen_kv_transfer_bytes_sum": "bytes",
    "vllm:hexgen_kv_transfer_bytes_count": "transfers",
    "vllm:hexgen_kv_transfer_seconds_sum": "seconds",
    "vllm:hexgen_kv_failed_transfers_total": "failed",
    "vllm:hexgen_kv_expired_leases_total": "expired",
}
"""Field of `KvTotals` by the metric that counts it."""


@dataclass(frozen=True)
class KvTotals:
    """Since the engine's start. `expired`: prompts whose lease ran out before anyone fetched them
    (producer's side).
    """

    bytes: float = 0.0
    transfers: float = 0.0
    seconds: float = 0.0
    failed: float = 0.0
    expired: float = 0.0

    def __add__(self, other: KvTotals) -> KvTotals:
        return KvTotals(
            self.bytes + other.bytes,
            self.transfers + other.transfers,
            self.seconds + other.seconds,
            self.failed + other.failed,
            self.expired + other.expired,
        )


def parse_kv_totals(exposition: str) -> KvTotals:
    """Totals from one engine's /metrics, summed over its ranks; zeros where it has no such metrics."""
    found = dict.fromkeys(_FIELDS.values(), 0.0)
    for name, value in _LINE.findall(exposition):
        if name in _FIELDS:
            found[_FIELDS[name]] += float(value)
    return KvTotals(**found)


async def kv_transfer_totals(
    urls: Mapping[str, str] | Iterable[str],
    session: aiohttp.ClientSession | None = None,
    timeout_s: float = 2.0,
) -> dict[str, KvTotals]:
    """Each engine's totals, keyed as `urls` is (a mapping name -> base address, or addresses).

    Engines that do not answer are left out.
    """
    named = dict(urls) if isinstance(urls, Mapping) else {url: url for url in urls}
    if session is None:
        async with aiohttp.ClientSession() as own:
            return await kv_transfer_totals(named, own, timeout_s)
    timeout = aiohttp.ClientTimeout(total=timeout_s)

    async def one(url: str) -> KvTotals | None:
        try:
            async with session.get(url.rstrip("/") + "/metrics", timeout=timeout) as response:
                if response.status != 200:
                    return None
                return parse_kv_totals((await response.read()).decode("utf-8", "replace"))
        except (aiohttp.ClientError, TimeoutError, ValueError):
            return None

    totals = await asyncio.gather(*map(one, named.values()))
    return {name: total for name, total in zip(named, totals, strict=True) if total is not None}
