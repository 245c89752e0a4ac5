"""The control messages between decode and prefill workers, and their frames.

A frame is four bytes of length (big endian) and a msgpack pair [number, message]. Messages are decoded into
typed structs, never unpickled; anything that does not fit ends the connection. The KV cache itself never passes
here.
"""

from __future__ import annotations

import asyncio
import struct

import msgspec

from hexgen2.vllm_plugin.kv_connector.shards import WorkerTable

PROTOCOL = 2
"""Raised whenever a message changes; both sides must agree."""

LONGEST_REQUEST = 64 * 1024
LONGEST_REPLY = 64 * 1024 * 1024  # a welcome carries the table of every layer and NIXL's keys
_LENGTH = struct.Struct(">I")


class WireError(Exception):
    """A frame that is too long or is no message of this protocol."""


class Hello(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """First message of a connection. `worker` is the incarnation that the caller expects to find, `model` the
    fingerprint of what it serves; `tables` asks for the tables (readers need them, schedulers do not).
    """

    protocol: int
    model: str
    worker: str
    tables: bool


class Announce(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """I am about to read under this lease; hold it for so long. Here and below `lease` is a lease's number, or
    a stream's key (see `streams`).
    """

    lease: int | str
    reader: str
    hold_s: float


class Finish(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """My read is over. The answer says whether the lease was held throughout."""

    lease: int | str
    reader: str


class Renew(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """The request still waits on the decode side."""

    lease: int | str
    duration_s: float


class Release(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Nobody will read under this lease any more."""

    lease: int | str


class Follow(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Tell me when all layers hold `stop` tokens of this stream or when it has come to `wanted`, its tokens
    counted once for each layer that holds them; at the latest after `wait_s`. I know its first `blocks` blocks.
    A reader thereby says that no read of its is under way, and that it is about to read what the answer names,
    as with Announce; without a name it only asks.
    """

    key: str
    reader: str
    hold_s: float
    wanted: int
    stop: int
    blocks: int
    wait_s: float


class Welcome(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Answer to Hello: NIXL's metadata of this worker and its table (empty and None unless asked for)."""

    engine: str
    metadata: bytes
    table: WorkerTable | None


class Answer(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Answer to the rest: whether the lease is held, and if not, why."""

    held: bool
    reason: str = ""


class Advance(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Answer to Follow. `state` is a `LeaseState`; all of the worker's layers hold `done` tokens, the first
    `layers` ones of its table `ahead`; `blocks` are those that the reader does not know.
    """

    state: str
    reason: str
    done: int
    layers: int
    ahead: int
    blocks: tuple[int, ...]


class Refusal(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Answer to a Hello that cannot be welcomed; the connection ends with it."""

    reason: str


Request = Hello | Announce | Finish | Renew | Release | Follow
Reply = Welcome | Answer | Advance | Refusal

_encoder = msgspec.msgpack.Encoder()
_requests = msgspec.msgpack.Decoder(tuple[int, Request])
_replies = msgspec.msgpack.Decoder(tuple[int, Reply])


def frame(number: int, message: Request | Reply) -> bytes:
    body = _encoder.encode((number, message))
    return _LENGTH.pack(len(body)) + body


async def read_request(stream: asyncio.StreamReader) -> tuple[int, Request]:
    """The next request. Raises WireError, or IncompleteReadError at the end of the connection."""
    try:
        return _requests.decode(await _read_frame(stream, LONGEST_REQUEST))
    except (msgspec.MsgspecError, ValueError) as error:
        raise WireError(str(error)) from error


async def read_reply(stream: asyncio.StreamReader) -> tuple[int, Reply]:
    """The next reply. Raises as `read_request` does."""
    try:
        return _replies.decode(await _read_frame(stream, LONGEST_REPLY))
    except (msgspec.MsgspecError, ValueError) as error:
        raise WireError(str(error)) from error


async def _read_frame(stream: asyncio.StreamReader, longest: int) -> bytes:
    (length,) = _LENGTH.unpack(await stream.readexactly(_LENGTH.size))
    if length > longest:
        raise WireError(f"a frame of {length} bytes, the longest allowed is {longest}")
    return await stream.readexactly(length)
