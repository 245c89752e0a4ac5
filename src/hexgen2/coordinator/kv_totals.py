"""How much KV cache the engines have moved, as they count it themselves.

vLLM's NIXL connector counts on the engine that receives. The counters follow a transfer with the engine's
next step, so an engine that falls idle may show its last transfer only with the next request.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import aiohttp

_LINE = re.compile(r'^(vllm:[a-z_]+)(?:\{(?:[^"}]|"(?:\\.|[^"\\])*")*\})?\s+(\S+)', re.MULTILINE)

_BYTES = "vllm:nixl_bytes_transferred_sum"
_COUNT = "vllm:nixl_bytes_transferred_count"
_SECONDS = "vllm:nixl_xfer_time_seconds_sum"
_FAILED = "vllm:nixl_num_failed_transfers_total"
_EXPIRED = "vllm:nixl_num_kv_expired_reqs_total"


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
    found = dict.fromkeys((_BYTES, _COUNT, _SECONDS, _FAILED, _EXPIRED), 0.0)
    for name, value in _LINE.findall(exposition):
        if name in found:
            found[name] += float(value)
    return KvTotals(*found.values())


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
