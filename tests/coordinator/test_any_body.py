"""Bodies whose fields are of any type: the engine judges them, the coordinator must not trip over them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hexgen2.coordinator import Limits
from hexgen2.coordinator.journal import Journal
from hexgen2.coordinator.prefixes import prefix_blocks
from hexgen2.coordinator.request import parse_request
from hexgen2.coordinator.sizes import SizeEstimator

from .conftest import Stand, running

FIELDS = (
    *("prompt", "messages", "tools", "tool_choice", "response_format", "stop", "n", "best_of", "seed", "echo"),
    *(
        "logprobs",
        "temperature",
        "max_tokens",
        "max_completion_tokens",
        "min_tokens",
        "priority",
        "stream_options",
    ),
    *(
        "prompt_embeds",
        "structured_outputs",
        "truncate_prompt_tokens",
        "kv_transfer_params",
        "return_token_ids",
    ),
)
SIMPLE = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3)
ANY = st.recursive(
    SIMPLE,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(("type", "text", "content", "role", "include_usage")), inner, max_size=3
        )
    ),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(body=st.dictionaries(st.sampled_from(FIELDS), ANY, max_size=5), chat=st.booleans())
@example(body={"messages": [{"role": "user", "content": [5]}]}, chat=True)
def test_any_fields_are_read(body: dict[str, Any], chat: bool) -> None:
    endpoint = "/v1/chat/completions" if chat else "/v1/completions"
    request = parse_request(endpoint, json.dumps({**body, "stream": True}).encode(), {}, "id", ("tiny",))
    journal = Journal(request.body, chat)
    assert journal.asks_for_ids in (True, False)
    assert len(prefix_blocks(request.body)) <= 64
    assert SizeEstimator().size(request) is not None


async def test_a_part_of_a_message_that_is_no_object_is_for_the_engine_to_judge(pair: Stand) -> None:
    body = {"messages": [{"role": "user", "content": [5]}], "stream": True, "max_tokens": 1}
    assert (await pair.post("/v1/chat/completions", body))[0] == 200  # the emulator takes it


@pytest.mark.parametrize("status", [413, 500])
async def test_requests_are_counted_by_their_outcome(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that end before they are served, be it by a mistake of ours."""

    def mistaken(*_: Any) -> Any:
        raise RuntimeError("a mistake")

    if status == 500:
        monkeypatch.setattr("hexgen2.coordinator.generation.parse_request", mistaken)
    async with running({"c0": 1.0}, limits=Limits(max_body_bytes=1024)) as stand:
        got, _, _ = await stand.post("/v1/completions", {"prompt": "a" * (2000 if status == 413 else 1)})
        assert got == status
        assert await stand.metric("hexgen2:requests_total", status=str(status)) == 1
        assert await stand.metric("hexgen2:requests_cancelled_total") == 0
