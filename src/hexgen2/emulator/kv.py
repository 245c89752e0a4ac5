"""The hand-over of a prompt's KV cache between two emulated engines.

It keeps the rules of vLLM's NIXL pull connector that a proxy can trip over: the producer holds a finished
prompt's blocks for a lease only, the first pull frees them, and a consumer that comes too late (or second)
gets other data and answers 200 with wrong tokens. Only a producer that cannot be reached, or is another one
than before at the same address (it was started again), is an error.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import aiohttp

from hexgen2.emulator.tokens import fingerprint

PULL_PATH = "/emulator/kv/"


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class _Held:
    fingerprint: int
    tokens: int
    expires: float
    gone: Callable[[], None]


class KvStore:
    """The producer's side: finished prompts that wait to be pulled."""

    def __init__(self, engine_id: str, lease_s: float, block_size: int = 16) -> None:
        self._engine_id = engine_id
        self._lease_s = lease_s
        self._block_size = block_size
        self._held: dict[str, _Held] = {}
        self._numbers = itertools.count()
        self.expired_total = 0

    def offer(
        self, request_id: str, prompt: list[int], host: str, port: int, gone: Callable[[], None] = _nothing
    ) -> dict[str, Any]:
        """Hold a prompt's KV cache; the `kv_transfer_params` that fetch it. ``gone`` is called when nobody
        holds it any more."""
        self.expire()
        key = f"{request_id}-{next(self._numbers)}"
        self._held[key] = _Held(fingerprint(prompt), len(prompt), time.monotonic() + self._lease_s, gone)
        blocks = -(-len(prompt) // self._block_size)
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_block_ids": [list(range(blocks))],
            "remote_engine_id": self._engine_id,
            "remote_request_id": key,
            "remote_host": host,
            "remote_port": port,
            "tp_size": 1,
            "remote_num_tokens": len(prompt),
        }

    def pull(self, key: str) -> _Held | None:
        """Give a prompt's KV cache away; None where the lease has run out or it is gone."""
        self.expire()
        held = self._held.pop(key, None)
        if held is not None:
            held.gone()
        return held

    @property
    def held(self) -> int:
        self.expire()
        return len(self._held)

    def expire(self) -> None:
        """Drop what was not fetched within its lease."""
        now = time.monotonic()
        for key in [key for key, held in self._held.items() if held.expires < now]:
            self._held.pop(key).gone()
            self.expired_total += 1


class PullFailed(Exception):
    """The producer cannot be reached, or is not the one that computed the prompt."""


async def fetch(session: aiohttp.ClientSession, kv: dict[str, Any], prompt: list[int]) -> bool:
    """Pull a prompt's KV cache; whether it is the right one. PullFailed where the producer is gone."""
    producer = f"http://{kv['remote_host']}:{kv['remote_port']}"
    url = f"{producer}{PULL_PATH}{kv['remote_engine_id']}/{kv['remote_request_id']}"
    try:
        async with session.post(url) as response:
            if response.status == 409:
                raise PullFailed(f"the engine at {producer} is not {kv['remote_engine_id']}")
            if response.status != 200:
                return False
            body = await response.json()
            return bool(body["fingerprint"] == fingerprint(prompt))
    except (aiohttp.ClientError, TimeoutError) as error:
        raise PullFailed(str(error)) from error
