"""Requests that go well: both legs, pass-through, identity of tokens."""

from __future__ import annotations

from typing import Any

import pytest

from hexgen2.coordinator.legs import handoff_obstacle
from hexgen2.emulator import tokens

from .conftest import MODEL, Stand, expected, parse_events, running, text_of

MESSAGES = [{"role": "user", "content": "hello there"}]


async def test_completion_goes_through_both_legs(pair: Stand) -> None:
    answer = await pair.complete("a b c", max_tokens=7, temperature=0)
    assert answer["choices"][0]["text"] == expected("a b c", 7)
    assert answer["usage"]["completion_tokens"] == 7
    (leg1,), (leg2,) = pair.received("p0"), pair.received("d0")
    assert leg1 == {
        "model": MODEL,
        "prompt": "a b c",
        "max_tokens": 1,
        "temperature": 0,
        "stream": False,
        "kv_transfer_params": {
            "do_remote_decode": True,
            "do_remote_prefill": False,
            "remote_engine_id": None,
            "remote_block_ids": None,
            "remote_host": None,
            "remote_port": None,
        },
    }
    kv = leg2.pop("kv_transfer_params")
    assert kv["remote_engine_id"] == pair.engines["p0"].engine_id
    assert kv["do_remote_prefill"] is True
    assert leg2 == {"model": MODEL, "prompt": "a b c", "max_tokens": 7, "temperature": 0}
    assert pair.engines["d0"].kv_pulls == 1
    assert pair.engines["p0"].kv_store.held == 0


async def test_leg_one_drops_what_would_fail_or_generate_more(pair: Stand) -> None:
    body = {
        "messages": MESSAGES,
        "max_completion_tokens": 20,
        "min_tokens": 5,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    events = parse_events((await pair.post("/v1/chat/completions", body))[1])
    assert events[-1] == "[DONE]"
    assert events[-2]["usage"]["completion_tokens"] == 20
    (leg1,) = pair.received("p0")
    assert {key: leg1.get(key) for key in ("max_tokens", "max_completion_tokens", "stream")} == {
        "max_tokens": 1,
        "max_completion_tokens": 1,
        "stream": False,
    }
    assert not {"stream_options", "min_tokens"} & leg1.keys()
    assert pair.received("d0")[0]["min_tokens"] == 5


UNKNOWN: dict[str, Any] = {
    "some_new_field": {"deep": [1, 2.5, None, "ü", "狐"]},
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    "tool_choice": "auto",
    "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}},
    "seed": 2**62,
    "logit_bias": {"5": -1.5},
    "stop": ["zzz"],
    "vllm_xargs": {"a": 1},
}


@pytest.mark.parametrize("routes", [{"p0>d0": 1.0}, {"c0": 1.0}])
async def test_every_field_reaches_the_engine_unaltered(routes: dict[str, float]) -> None:
    async with running(routes) as stand:
        sent = {"model": "tiny", "messages": MESSAGES, "max_tokens": 3, **UNKNOWN}
        status, answer, _ = await stand.post("/v1/chat/completions", sent)
        assert status == 200, answer
        (body,) = stand.received("d0" if "d0" in stand.engines else "c0")
        body.pop("kv_transfer_params", None)
        assert body == sent
        if "p0" in stand.engines:
            (leg1,) = stand.received("p0")
            assert {key: leg1[key] for key in UNKNOWN} == UNKNOWN


async def test_one_engine_gets_the_very_bytes() -> None:
    async with running({"c0": 1.0}) as stand:
        raw = b'{ "prompt":"x",\n "max_tokens": 2, "top_p": 0.10, "model":"tiny"}'
        assert (await stand.post("/v1/completions", raw))[0] == 200
        assert stand.received("c0") == [{"prompt": "x", "max_tokens": 2, "top_p": 0.1, "model": "tiny"}]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_stream_equals_answer_and_keeps_order(pair: Stand, path: str) -> None:
    body: dict[str, Any] = {"max_tokens": 40}
    if "chat" in path:
        body["messages"] = MESSAGES
        whole = (await pair.post(path, body))[1]["choices"][0]["message"]["content"]
    else:
        whole = (await pair.complete("a b c", **body))["choices"][0]["text"]
    events = await pair.stream("a b c", path, **body)
    assert text_of(events) == whole
    assert events[-1] == "[DONE]"
    assert events[-2]["choices"][0]["finish_reason"] == "length"


async def test_stop_strings_logprobs_and_echo(pair: Stand) -> None:
    ids = tokens.generate(tokens.encode("a b c"), 20)
    stop = tokens.token_text(ids[6]).strip()
    answer = await pair.complete("a b c", max_tokens=20, stop=[stop], logprobs=1)
    choice = answer["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
    assert choice["text"] == tokens.decode(ids[:6]) + " "
    assert len(choice["logprobs"]["tokens"]) == 7
    echoed = await pair.complete("a b c", max_tokens=2, echo=True)
    assert echoed["choices"][0]["text"] == "a b c" + expected("a b c", 2)


ONE_ENGINE: list[tuple[dict[str, Any], str]] = [
    ({"prompt": ["a b", "c d"]}, "several_prompts"),
    ({"prompt": [[1, 2], [3]]}, "several_prompts"),
    ({"prompt": "a", "n": 3}, "several_sequences"),
    ({"prompt": "a", "best_of": 2}, "several_sequences"),
    ({"prompt": "a", "prompt_logprobs": 0}, "prompt_logprobs"),
    ({"prompt": "a", "echo": True, "logprobs": 0}, "prompt_logprobs"),
    ({"prompt": "a", "echo": True, "max_tokens": 0}, "prompt_logprobs"),
    ({"prompt": "a", "use_beam_search": True}, "beam_search"),
    ({"prompt_embeds": "x", "prompt": "a"}, "prompt_embeds"),
    ({"prompt": "a", "truncate_prompt_tokens": -1}, "truncate_prompt_tokens"),
]


@pytest.mark.parametrize(("body", "reason"), ONE_ENGINE)
async def test_what_cannot_be_split_is_served_by_one_engine(body: dict[str, Any], reason: str) -> None:
    """Through two legs the emulated engines would answer some of these with wrong tokens, as vLLM does."""
    async with running({"p0>d0": 0.9, "c0": 0.1}) as stand:
        answer = await stand.complete(**({"max_tokens": 4} | body))
        assert (len(stand.received("c0")), stand.received("p0"), stand.received("d0")) == (1, [], [])
        assert answer["choices"][0]["finish_reason"] == "length"
        assert await stand.metric("hexgen2:one_engine_requests_total", reason=reason) == 1
    async with running({"p0>d0": 1.0}) as stand:
        assert (await stand.complete(**({"max_tokens": 4} | body)))["choices"] == answer["choices"]
        assert (len(stand.received("d0")), stand.received("p0")) == (1, [])


@pytest.mark.parametrize(
    "body",
    [{"prompt": [1, 2, 3]}, {"prompt": ["only one"]}, {"prompt": "a", "n": 1}, {"prompt": "a", "echo": True}],
)
def test_what_can_be_split(body: dict[str, Any]) -> None:
    assert handoff_obstacle(body) is None


async def test_a_client_cannot_steer_the_kv_transfer(pair: Stand) -> None:
    evil = {"do_remote_prefill": True, "remote_host": "10.0.0.1", "remote_port": 1, "remote_request_id": "x"}
    answer = await pair.complete("a b", max_tokens=3, kv_transfer_params=evil, ec_transfer_params={"x": 1})
    assert answer["choices"][0]["text"] == expected("a b", 3)
    assert pair.received("d0")[0]["kv_transfer_params"]["remote_host"] == "127.0.0.1"
    assert "ec_transfer_params" not in pair.received("p0")[0]
    async with running({"c0": 1.0}) as stand:
        await stand.complete("a b", kv_transfer_params=evil)
        assert "kv_transfer_params" not in stand.received("c0")[0]


async def test_request_id_is_one_on_both_legs_and_comes_back(pair: Stand) -> None:
    _, answer, headers = await pair.post("/v1/completions", {"prompt": "a"}, X_Request_Id="my-id")
    assert headers["X-Request-Id"] == "my-id"
    assert answer["id"] == "cmpl-my-id"
    _, _, made = await pair.post("/v1/completions", {"prompt": "a"})
    seen = [[r.headers["X-Request-Id"] for r in pair.engines[g].received] for g in ("p0", "d0")]
    assert seen[0] == seen[1] == ["my-id", made["X-Request-Id"]]
    _, _, strange = await pair.post("/v1/completions", {"prompt": "a"}, X_Request_Id="x" * 300)
    assert len(strange["X-Request-Id"]) == 32


async def test_headers_pass_but_keys_do_not(pair: Stand) -> None:
    await pair.post("/v1/completions", {"prompt": "a"}, traceparent="00-abc-def-01", Authorization="Bearer s")
    for group in ("p0", "d0"):
        (request,) = pair.engines[group].received
        assert request.headers["traceparent"] == "00-abc-def-01"
        assert "Authorization" not in request.headers


async def test_models_version_tokenize(pair: Stand) -> None:
    async with pair.http.get(pair.url + "/v1/models") as response:
        cards = (await response.json())["data"]
    assert [card["id"] for card in cards] == ["tiny", "alias"]
    assert cards[0]["max_model_len"] == 131_072
    async with pair.http.get(pair.url + "/v1/models/tiny") as response:
        assert (await response.json())["id"] == "tiny"
    async with pair.http.get(pair.url + "/version") as response:
        assert response.status == 200
    assert (await pair.post("/tokenize", {"prompt": "a b c"}))[1]["count"] == 3


async def test_metrics_tell_of_the_requests(pair: Stand) -> None:
    await pair.complete(max_tokens=3)
    await pair.stream(max_tokens=5)
    await pair.stream(path="/v1/chat/completions", messages=MESSAGES, max_tokens=5)
    assert await pair.metric("hexgen2:time_to_first_token_seconds_count", group="d0", role="decode") == 2
    assert await pair.metric("hexgen2:time_per_output_token_seconds_count", group="d0") == 2
    assert await pair.metric("hexgen2:e2e_request_latency_seconds_count", group="d0") == 3
    assert await pair.metric("hexgen2:leg_seconds_count", group="p0", role="prefill") == 3
    assert await pair.metric("hexgen2:output_tokens_total") == 13
    assert await pair.metric("hexgen2:route_requests_total", prefill="p0", target="d0") == 3
    assert await pair.metric("hexgen2:route_share", prefill="p0", target="d0") == 1.0
    assert await pair.metric("hexgen2:requests_total", endpoint="/v1/completions", status="200") == 2
    assert await pair.metric("hexgen2:kv_transfer_bytes_total", group="d0") == pair.engines["d0"].kv_bytes > 0
    assert await pair.metric("hexgen2:kv_transfers_total", group="d0") == 3
    assert await pair.metric("hexgen2:requests_in_flight") == 0


async def test_report_headers_are_opt_in(pair: Stand) -> None:
    _, _, plain = await pair.post("/v1/completions", {"prompt": "a"})
    assert "X-Hexgen2-Route" not in plain
    _, _, told = await pair.post("/v1/completions", {"prompt": "a", "stream": True}, X_Hexgen2_Report="1")
    assert (told["X-Hexgen2-Route"], told["X-Hexgen2-Retries"]) == ("p0->d0", "0")


async def test_a_client_that_waits_to_be_asked_for_its_body(pair: Stand) -> None:
    """curl sends `Expect: 100-continue` with large bodies."""
    body = {"prompt": "a b", "max_tokens": 3}
    async with pair.http.post(pair.url + "/v1/completions", json=body, expect100=True) as response:
        assert response.status == 200
        assert (await response.json())["choices"][0]["text"] == expected("a b", 3)
