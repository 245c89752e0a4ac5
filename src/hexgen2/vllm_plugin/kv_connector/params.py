"""`kv_transfer_params`: what the answer of leg 1 says about its KV cache, for leg 2 to bring to the decode
engine.

The keys of vLLM's own connectors are kept where they mean the same, so that a proxy that looks at them finds
them; ours stand under `hexgen`. Whatever lies between the legs passes the object on whole. It arrives from
outside, so it is validated field by field before it is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import msgspec

VERSION = 1


@dataclass(frozen=True)
class WorkerAddress:
    """Where a worker's control server listens, and which start of it is meant (a restart makes a new one)."""

    host: str
    port: int
    incarnation: str


@dataclass(frozen=True)
class Offer:
    """KV of `tokens` tokens in `blocks`, `block_tokens` tokens each, held under `lease` by every one of
    `workers`.
    """

    version: int
    engine: str
    lease: int
    lease_s: float
    tokens: int
    block_tokens: int
    blocks: tuple[int, ...]
    workers: tuple[WorkerAddress, ...]


def encode_offer(offer: Offer, request_id: str) -> dict[str, Any]:
    """The object for leg 1's answer; JSON-safe."""
    first = offer.workers[0]
    body = asdict(offer)
    body["blocks"] = []  # they stand in remote_block_ids, once
    body["workers"] = [asdict(worker) for worker in offer.workers]
    return {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_engine_id": offer.engine,
        "remote_request_id": request_id,
        "remote_block_ids": [list(offer.blocks)],
        "remote_host": first.host,
        "remote_port": first.port,
        "hexgen": body,
    }


def decode_offer(params: Mapping[str, Any]) -> Offer:
    """The offer in leg 2's `kv_transfer_params`. Raises ValueError (one line) if it is none."""
    body = params.get("hexgen")
    groups = params.get("remote_block_ids")
    if not isinstance(body, Mapping):
        raise ValueError("it has no `hexgen` part: the other engine uses another KV connector")
    if not isinstance(groups, list) or len(groups) != 1:
        raise ValueError("remote_block_ids is not one list of blocks")
    try:
        offer = msgspec.convert({**body, "blocks": groups[0]}, Offer)
    except (msgspec.ValidationError, TypeError) as error:
        raise ValueError(str(error)) from error
    if offer.version != VERSION:
        raise ValueError(f"it is of version {offer.version}, this connector speaks {VERSION}")
    if not offer.workers:
        raise ValueError("it names no workers")
    if min((offer.lease, offer.tokens, offer.block_tokens)) <= 0 or not 0 < offer.lease_s < 86_400:
        raise ValueError("a number that must be positive is not")
    if any(block < 0 for block in offer.blocks):
        raise ValueError("a block number is negative")
    if len(offer.blocks) * offer.block_tokens < offer.tokens:
        raise ValueError(
            f"{len(offer.blocks)} blocks of {offer.block_tokens} tokens cannot hold {offer.tokens}"
        )
    if any(not 0 < worker.port < 65_536 for worker in offer.workers):
        raise ValueError("a port number is out of range")
    return offer
