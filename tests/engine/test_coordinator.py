"""The coordinator before real engines: two legs, and streams that outlive their engine."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from hexgen2.coordinator import Coordinator, kv_transfer_totals
from hexgen2.deploy import guard
from tests.deploy.builders import cluster, group, plan
from tests.engine.fleet import PROMPTS, Fleet, completion, running
from tests.waiting import HUNG_S, until

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]

LAYERS = 8
CHAT = {
    "model": "tiny-llama",
    "messages": [{"role": "user", "content": "Tell me of the fox."}],
    "max_completion_tokens": 150,
    "temperature": 0,
    "ignore_eos": True,
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fleet]:
    devices = cluster(("a", "cpu-1c", 1), ("b", "cpu-1c", 1), ("c", "cpu-1c", 1))
    groups = [
        group("p0", "prefill", (["a/0"], LAYERS), share=1.0),
        group("d0", "decode", (["b/0"], LAYERS), share=0.5),
        group("d1", "decode", (["c/0"], LAYERS), share=0.5),
    ]
    routes = [("p0", "d0", 0.5), ("p0", "d1", 0.5)]
    run_dir = tmp_path_factory.mktemp("coordinator")
    async with running(plan(devices, groups, *routes, model="tiny-llama"), run_dir) as fleet:
        yield fleet


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def door(fleet: Fleet) -> AsyncIterator[Coordinator]:
    config = fleet.deployment.coordinator
    timeouts = config.timeouts.model_copy(update={"health_interval_s": 0.2})
    async with Coordinator(config.model_copy(update={"timeouts": timeouts})).running() as door:
        yield door


async def stream(
    door: Coordinator, http: aiohttp.ClientSession, body: dict[str, Any], after: int = 0, act: Any = None
) -> list[Any]:
    """Every event; `act` is called once, when `after` events have come."""
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    found: list[Any] = []
    async with http.post(door.url + path, json={**body, "stream": True}) as response:
        assert response.status == 200, await response.text()
        async for line in response.content:
            if line.startswith(b"data: "):
                text = line[6:].strip()
                found.append("[DONE]" if text == b"[DONE]" else json.loads(text))
                if act is not None and len(found) == after:
                    act()
    return found


def text_of(events: list[Any]) -> str:
    choices = [event["choices"][0] for event in events if event != "[DONE]" and event.get("choices")]
    return "".join(choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices)


def lose_busy_engine(door: Coordinator, hits: list[str]) -> Callable[[], None]:
    """Declare the decode engine that works down, as the watch does; the next poll brings it back."""

    def act() -> None:
        for engine in door.fleet.engines.values():
            if engine.id.startswith("d") and engine.in_flight:
                hits.append(engine.id)
                door.fleet.mark_down(engine, "lost by the test")

    return act


async def cut_off(
    fleet: Fleet, door: Coordinator, body: dict[str, Any], after: int, surely: bool = False
) -> list[Any]:
    """The events of a stream whose engine is lost when so many have come.

    On a busy machine the last tokens may come in one read with those: then nothing is running any more, and the
    stream ends by itself. `surely`: it is asked for again until one went on elsewhere.
    """
    for _ in range(10):
        before = door.metrics.migrations._value.get()
        hits: list[str] = []
        events = await stream(door, fleet.http, body, after, lose_busy_engine(door, hits))
        went_on = door.metrics.migrations._value.get() - before
        assert went_on <= len(hits)
        await ready(door)
        if went_on or not surely:
            return events
    raise AssertionError("it never went on elsewhere")


async def test_two_legs_give_one_engine_s_tokens(fleet: Fleet, door: Coordinator) -> None:
    for prompt in PROMPTS:
        body = completion(prompt)
        alone = (await fleet.direct("p0", body))["choices"][0]
        async with fleet.http.post(door.url + "/v1/completions", json=body) as response:
            assert response.status == 200
            both = (await response.json())["choices"][0]
        assert both["token_ids"] == alone["token_ids"]
        events = await stream(door, fleet.http, body)
        assert text_of(events) == alone["text"]
        assert events[-1] == "[DONE]"
    urls = {group: door.fleet.engines[group].endpoint.url for group in ("d0", "d1")}
    moved = await kv_transfer_totals(urls, fleet.http)
    assert sum(total.bytes for total in moved.values()) > 0


@pytest.mark.parametrize("after", [1, 2, 9, 23])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"logprobs": 2},
        {"stream_options": {"include_usage": True}},
        {"min_tokens": 20, "ignore_eos": False},
    ],
)
async def test_streams_go_on_elsewhere(
    fleet: Fleet, door: Coordinator, more: dict[str, Any], after: int
) -> None:
    body = completion(PROMPTS[0], 150) | more
    del body["return_token_ids"]
    whole = await stream(door, fleet.http, body)
    surely = after < 5 and "min_tokens" not in more  # that answer may end by itself early
    again = await cut_off(fleet, door, body, after, surely)
    assert text_of(again) == text_of(whole)
    assert again[-1] == "[DONE]"
    if "stream_options" in more:
        assert again[-2]["usage"] == whole[-2]["usage"]
    if "logprobs" in more:
        for key in ("tokens", "text_offset"):
            joined = [
                [entry for event in events[:-1] for entry in event["choices"][0]["logprobs"][key]]
                for events in (whole, again)
            ]
            assert joined[0] == joined[1]


@pytest.mark.parametrize("after", [1, 2, 8, 20])
async def test_chat_goes_on_elsewhere(fleet: Fleet, door: Coordinator, after: int) -> None:
    whole = await stream(door, fleet.http, CHAT)
    again = await cut_off(fleet, door, CHAT, after)
    assert text_of(again) == text_of(whole)
    assert set(again[0]) == set(whole[0])
    last, wanted = again[-2], whole[-2]
    assert set(last) == set(wanted)
    assert set(last["choices"][0]) == set(wanted["choices"][0])
    assert last["choices"][0]["finish_reason"] == wanted["choices"][0]["finish_reason"]


@pytest.mark.parametrize("after", range(1, 16, 2))
async def test_stop_strings_across_the_seam(fleet: Fleet, door: Coordinator, after: int) -> None:
    """The stop string is taken from the answer itself and spans tokens, so some cuts fall inside it."""
    free = text_of(await stream(door, fleet.http, completion(PROMPTS[0], 24)))
    at = len(free) // 2
    body = completion(PROMPTS[0], 24) | {"stop": [free[at : at + 7]]}
    whole = await stream(door, fleet.http, body)
    again = await cut_off(fleet, door, body, after)
    assert text_of(again) == text_of(whole)
    assert again[-2]["choices"][0]["finish_reason"] == "stop"
    assert again[-2]["choices"][0]["stop_reason"] == body["stop"][0]


@pytest.mark.parametrize("after", [15, 19, 40])
async def test_special_tokens_are_not_shown_before_the_seam_either(
    fleet: Fleet, door: Coordinator, after: int
) -> None:
    """The answer goes beyond its end several times; what may begin the stop string is held back."""
    words = " ".join(f"w{number * 37 % 5000}" for number in range(30))
    body = CHAT | {"messages": [{"role": "user", "content": words}], "stop": ["no text of this model"]}
    whole = await stream(door, fleet.http, body)
    again = await cut_off(fleet, door, body, after)
    assert text_of(again) == text_of(whole)
    assert again[-1] == "[DONE]"
    shown = await stream(door, fleet.http, body | {"skip_special_tokens": False})
    assert "</s>" in text_of(shown)


@pytest.mark.parametrize("after", range(1, 12))
async def test_characters_of_several_tokens_stay_whole(fleet: Fleet, door: Coordinator, after: int) -> None:
    """Only the bytes of one character may be generated: the cut falls between them."""
    async with fleet.http.post(door.url + "/tokenize", json={"prompt": "狐", "add_special_tokens": False}) as r:
        ids = (await r.json())["tokens"]
    body = completion("狐狐狐狐狐", 12) | {"allowed_token_ids": ids}
    whole = await stream(door, fleet.http, body)
    again = await cut_off(fleet, door, body, after)
    assert text_of(again) == text_of(whole)


RUN_ANEW: list[dict[str, Any]] = [
    {"presence_penalty": 1.5, "frequency_penalty": 0.5},
    {"structured_outputs": {"regex": "([a-z]{2,8} ){30}"}, "ignore_eos": False},
    {"echo": True},
    {"n": 2, "seed": 3, "temperature": 1.0},
    CHAT | {"logprobs": True, "top_logprobs": 2, "max_completion_tokens": 60},
]


@pytest.mark.parametrize("after", [1, 3, 17])
@pytest.mark.parametrize("more", RUN_ANEW, ids=["penalties", "regex", "echo", "seeded", "chat-logprobs"])
async def test_streams_are_run_anew_elsewhere(
    fleet: Fleet, door: Coordinator, more: dict[str, Any], after: int
) -> None:
    """What cannot go on from token ids: the request is run again, and what was sent is passed over."""
    usage = {"stream_options": {"include_usage": True}}
    body = more | usage if "messages" in more else completion(PROMPTS[0], 60) | usage | more
    body.pop("return_token_ids", None)
    whole = await stream(door, fleet.http, body)
    again = await cut_off(fleet, door, body, after, surely=after < 3)
    assert [event for event in (again[-2], whole[-2]) if event["choices"]] == []
    assert again[-2]["usage"] == whole[-2]["usage"]
    for index in range(body.get("n", 1)):
        assert sums(again, index) == sums(whole, index)


def sums(events: list[Any], index: int) -> Any:
    """What a choice says in all: its text, its tokens' log probabilities (rounded) and how it ends."""
    found = [c for event in events[:-1] for c in event["choices"] if c["index"] == index]
    text = "".join(c.get("text") or c.get("delta", {}).get("content") or "" for c in found)
    content = [entry for c in found for entry in (c.get("logprobs") or {}).get("content") or ()]
    logprobs = [(entry["token"], round(entry["logprob"], 3)) for entry in content]
    return text, logprobs, [c["finish_reason"] for c in found if c["finish_reason"]]


async def test_an_engine_that_is_killed_loses_no_request(fleet: Fleet, door: Coordinator) -> None:
    """Last in this file: the core of a decode engine is killed while it answers some of eight streams."""
    body = completion(PROMPTS[1], 400)
    whole = text_of(await stream(door, fleet.http, body))
    before = taken_over(door)
    tasks = [asyncio.create_task(stream(door, fleet.http, body)) for _ in range(8)]
    await until(lambda: door.fleet.engines["d0"].in_flight > 0, every_s=0.001)
    for pid in [*guard.descendants(fleet.launcher.pids()["d0"])]:
        os.kill(pid, signal.SIGKILL)
    answers = await asyncio.wait_for(asyncio.gather(*tasks), 4 * HUNG_S)
    assert [events[-1] for events in answers] == ["[DONE]"] * 8
    assert {text_of(events) for events in answers} == {whole}
    assert taken_over(door) > before


def taken_over(door: Coordinator) -> float:
    """Requests that another engine served after the first failed, before their first token or after it."""
    return float(door.metrics.migrations._value.get() + door.metrics.retries._value.get())


async def ready(door: Coordinator) -> None:
    """Wait until every engine is back."""
    await until(lambda: all(engine.up for engine in door.fleet.engines.values()), 2 * HUNG_S)
