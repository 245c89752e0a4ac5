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
STREAM = "hexgen_stream"
LONGEST_KEY = 64


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


@dataclass(frozen=True)
class Stream:
    """A KV cache that a prefill engine computes, or is about to, for the request with this `key`; its blocks
    and tokens are learnt from the engine's workers.
    """

    version: int
    engine: str
    key: str
    lease_s: float
    block_tokens: int
    workers: tuple[WorkerAddress, ...]

    @property
    def lease(self) -> str:
        """What stands for the lease in messages to the workers."""
        return self.key


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
        # With a key added, what leg 2 of a later request may bring before its leg 1 has ended.
        STREAM: {name: body[name] for name in ("version", "engine", "lease_s", "block_tokens", "workers")},
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
    _check_source(offer)
    if min((offer.lease, offer.tokens)) <= 0:
        raise ValueError("a number that must be positive is not")
    if any(block < 0 for block in offer.blocks):
        raise ValueError("a block number is negative")
    if len(offer.blocks) * offer.block_tokens < offer.tokens:
        raise ValueError(
            f"{len(offer.blocks)} blocks of {offer.block_tokens} tokens cannot hold {offer.tokens}"
        )
    return offer


def stream_key(params: Mapping[str, Any]) -> str | None:
    """The key under which leg 1's KV cache may be read while it is computed; None where there is none (or no
    usable one: leg 2 then finds nothing under it).
    """
    body = params.get(STREAM)
    key = body.get("key") if isinstance(body, Mapping) else None
    return key if isinstance(key, str) and 0 < len(key) <= LONGEST_KEY else None


def decode_source(params: Mapping[str, Any]) -> Offer | Stream:
    """Where leg 2's `kv_transfer_params` say that the KV cache is. Raises ValueError (one line)."""
    if stream_key(params) is None:
        return decode_offer(params)
    try:
        stream = msgspec.convert(dict(params[STREAM]), Stream)
    except (msgspec.ValidationError, TypeError) as error:
        raise ValueError(str(error)) from error
    _check_source(stream)
    return stream


def _check_source(source: Offer | Stream) -> None:
    if source.version != VERSION:
        raise ValueError(f"it is of version {source.version}, this connector speaks {VERSION}")
    if not source.workers:
        raise ValueError("it names no workers")
    if source.block_tokens <= 0 or not 0 < source.lease_s < 86_400:
        raise ValueError("a number that must be positive is not")
    if any(not 0 < worker.port < 65_536 for worker in source.workers):
        raise ValueError("a port number is out of range")
