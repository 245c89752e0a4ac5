"""What arrives from outside is validated: `kv_transfer_params`, settings, control messages."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexgen2.vllm_plugin.kv_connector.params import Offer, WorkerAddress, decode_offer, encode_offer
from hexgen2.vllm_plugin.kv_connector.settings import Settings, read_settings
from hexgen2.vllm_plugin.kv_connector.wire import (
    LONGEST_REQUEST,
    Announce,
    Answer,
    Finish,
    Hello,
    Refusal,
    Release,
    Renew,
    Welcome,
    WireError,
    frame,
    read_reply,
    read_request,
)

from .layouts import Stage, build_memories

OFFER = Offer(
    version=1,
    engine="p0",
    lease=3,
    lease_s=30.0,
    tokens=200,
    block_tokens=128,
    blocks=(4, 9),
    workers=(WorkerAddress("10.0.0.1", 4000, "aa"), WorkerAddress("10.0.0.2", 4001, "bb")),
)


def test_an_offer_survives_the_journey_as_json() -> None:
    params = json.loads(json.dumps(encode_offer(OFFER, "request")))
    assert params["do_remote_prefill"] is True
    assert params["remote_block_ids"] == [[4, 9]]
    assert decode_offer(params) == OFFER


@pytest.mark.parametrize(
    ("path", "wrong", "message"),
    [
        (["hexgen"], None, "no `hexgen` part"),
        (["hexgen"], {}, "missing required field"),
        (["hexgen", "version"], 2, "version 2"),
        (["hexgen", "workers"], [], "no workers"),
        (["hexgen", "workers", 0, "port"], 0, "port"),
        (["hexgen", "workers", 0, "port"], "http", r"workers.*port"),
        (["hexgen", "lease"], 0, "positive"),
        (["hexgen", "lease_s"], -1.0, "positive"),
        (["hexgen", "tokens"], 300, "cannot hold 300"),
        (["hexgen", "tokens"], "many", "tokens"),
        (["remote_block_ids"], [], "one list"),
        (["remote_block_ids"], [[1], [2]], "one list"),
        (["remote_block_ids"], [[1, -2]], "negative"),
        (["remote_block_ids"], [["a", "b"]], "blocks"),
    ],
)
def test_an_offer_that_makes_no_sense_is_refused(path: list, wrong: Any, message: str) -> None:
    params = copy.deepcopy(encode_offer(OFFER, "request"))
    place: Any = params
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = wrong
    with pytest.raises(ValueError, match=message):
        decode_offer(params)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from([*encode_offer(OFFER, "r"), "other"]), json_values))
def test_no_json_at_all_is_more_than_a_value_error(changes: dict[str, Any]) -> None:
    with contextlib.suppress(ValueError):
        decode_offer({**encode_offer(OFFER, "r"), **changes})


def test_settings_have_defaults_and_names() -> None:
    assert read_settings({}) == Settings()
    assert read_settings({"lease_seconds": 5, "backends": ["UCX"]}).lease_seconds == 5


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lease_second": 5}, "lease_second"),
        ({"lease_seconds": 0}, "above 0"),
        ({"lease_seconds": "long"}, "lease_seconds"),
        ({"port": 70000}, "port"),
        ({"backends": []}, "backends"),
        ({"overlap_read_bytes": 0}, "overlap_read_bytes"),
    ],
)
def test_a_wrong_setting_is_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_settings(wrong)


def stream_of(data: bytes) -> asyncio.StreamReader:
    stream = asyncio.StreamReader()
    stream.feed_data(data)
    stream.feed_eof()
    return stream


@pytest.mark.parametrize(
    "message", [Hello(1, "m", "w", True), Announce(1, "r", 2.0), Finish(1, "r"), Renew(1, 3.0), Release(1)]
)
async def test_requests_come_through(message: Any) -> None:
    assert await read_request(stream_of(frame(7, message))) == (7, message)


async def test_replies_come_through() -> None:
    (memory,) = build_memories([Stage(1, 2)], kv_heads=2, channels=2, blocks=2, block_tokens=4)
    for message in (
        Welcome("p0", b"\x00\xff", memory.table),
        Welcome("p0", b"", None),
        Answer(True),
        Refusal("no"),
    ):
        assert await read_reply(stream_of(frame(1, message))) == (1, message)


@pytest.mark.parametrize(
    "data",
    [
        b"\x00\x00\x00\x01\xc1",
        b"\x00\x00\x00\x02\x91\x01",
        (LONGEST_REQUEST + 1).to_bytes(4, "big"),
        frame(1, Announce(1, "r", cast("int", "soon"))),
    ],
)
async def test_what_is_no_message_is_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        await read_request(stream_of(data))


@given(st.binary(max_size=60))
def test_any_bytes_end_in_a_message_or_a_known_error(data: bytes) -> None:
    async def read() -> None:
        with contextlib.suppress(WireError, asyncio.IncompleteReadError):
            await read_request(stream_of(data))

    asyncio.run(read())
