"""A stream whose engine is lost goes on elsewhere: one unbroken stream, no token lost or doubled."""

from __future__ import annotations

import asyncio
import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexgen2.coordinator import Limits
from hexgen2.coordinator.continuation import continuation_body, tokens_left
from hexgen2.coordinator.journal import Journal, continuation_obstacle
from hexgen2.coordinator.seam import StopSeam
from hexgen2.emulator import EmulatedEngine, EmulatorConfig, Fault, LinearTiming, protocol, tokens
from tests.waiting import until

from .conftest import ALERT, MODEL, QUICK, Stand, expected, parse_events, running, text_of

SLOW = EmulatorConfig(timing=LinearTiming(step_base_s=0.005))
TWO = {"c0": 0.5, "c1": 0.5}
MESSAGES = [{"role": "user", "content": "hello there"}]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
KINDS: list[Any] = ["die", "cut", "error_event", "finish_error"]


def fail_first(stand: Stand, kind: Any, after: int) -> None:
    """The first request to reach any engine fails; whoever takes over is well."""
    fault = Fault(kind, after_tokens=after, times=1)
    for group, engine in stand.engines.items():
        if not group.startswith("p"):
            engine.fault = fault


def dies_before_usage(engine: EmulatedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine is lost when all tokens have been sent, before its usage chunk and `[DONE]`."""
    used = protocol.usage

    def usage(*arguments: Any) -> Any:
        engine.kill()
        return used(*arguments)

    monkeypatch.setattr(protocol, "usage", usage)


def without_time(events: list[Any]) -> list[Any]:
    for event in events:
        if event != "[DONE]":
            event.pop("created")
            event.pop("id")
    return events


@pytest.mark.parametrize("routes", [TWO, {"p0>d0": 0.5, "p0>d1": 0.5}])
@pytest.mark.parametrize("cut", [1, 2, 7, 18, 19])
@pytest.mark.parametrize("kind", KINDS)
async def test_completion_streams_go_on(kind: Any, cut: int, routes: dict[str, float]) -> None:
    async with running(routes) as stand:
        body = {"max_tokens": 20, "stream_options": {"include_usage": True}, "temperature": 0}
        whole = await stand.stream("a b c", **body)
        fail_first(stand, kind, cut)
        again = await stand.stream("a b c", **body)
        assert len({event["id"] for event in again if event != "[DONE]"}) == 1
        assert without_time(again) == without_time(whole)
        assert text_of(again) == expected("a b c", 20)
        assert await stand.metric("hexgen2:migrations_total") == 1


@pytest.mark.parametrize("limit", [{"max_completion_tokens": 12}, {"max_tokens": 12}])
@pytest.mark.parametrize("cut", [1, 5])
@pytest.mark.parametrize("kind", KINDS)
async def test_chat_streams_go_on(kind: Any, cut: int, limit: dict[str, int]) -> None:
    async with running({"p0>d0": 0.5, "p1>d1": 0.5}) as stand:
        body = {"messages": MESSAGES, **limit, "stream_options": {"include_usage": True}}
        whole = await stand.stream(path=CHAT, **body)
        fail_first(stand, kind, cut)
        again = await stand.stream(path=CHAT, **body)
        assert without_time(again) == without_time(whole)


async def test_the_client_sees_ids_only_if_it_asked(pair: Stand) -> None:
    plain = await pair.stream("a b", max_tokens=4)
    assert [event["choices"][0]["token_ids"] for event in plain[:-1]] == [None] * 4
    assert plain[0]["choices"][0]["prompt_token_ids"] is None
    asked = await pair.stream("a b", max_tokens=4, return_token_ids=True)
    ids = [id_ for event in asked[:-1] for id_ in event["choices"][0]["token_ids"]]
    assert ids == tokens.generate(tokens.encode("a b"), 4)
    assert asked[0]["choices"][0]["prompt_token_ids"] == tokens.encode("a b")
    chat = await pair.stream(path=CHAT, messages=MESSAGES, max_tokens=4)
    assert all(event["choices"][0].get("token_ids") is None for event in chat[:-1])


ECHOED = 'say "häuser"\n\\ 狐'


@pytest.mark.parametrize("prompt", [ECHOED, [ECHOED], [5, 6, 7]])
@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("cut", [None, 1, 4])
async def test_a_stream_with_echo_begins_with_the_prompt(prompt: Any, ids: bool, cut: int | None) -> None:
    """vLLM leaves the echo out where token ids are asked for, as the coordinator does of its own accord."""
    async with running(TWO) as stand:
        body = {"model": MODEL, "max_tokens": 8, "echo": True, "return_token_ids": ids}
        async with stand.http.post(
            stand.engines["c0"].url + COMPLETIONS, json=body | {"prompt": prompt, "stream": True}
        ) as response:
            whole = parse_events(await response.text())
        if cut is not None and not (prompt == [5, 6, 7] and not ids):  # that one cannot go on elsewhere
            fail_first(stand, "error_event", cut)
        again = await stand.stream(prompt, **body)
        assert without_time(again) == without_time(whole)
        assert text_of(again).startswith(
            "" if ids else tokens.decode(prompt) if prompt == [5, 6, 7] else ECHOED
        )


async def test_ids_stay_whole_across_a_migration() -> None:
    async with running(TWO) as stand:
        fail_first(stand, "error_event", 3)
        events = await stand.stream("a b", max_tokens=9, return_token_ids=True)
        ids = [id_ for event in events[:-1] for id_ in event["choices"][0]["token_ids"]]
        assert ids == tokens.generate(tokens.encode("a b"), 9)


async def test_several_migrations_of_one_stream() -> None:
    async with running(TWO) as stand:
        for engine in stand.engines.values():
            engine.fault = Fault("error_event", after_tokens=4)
        events = await stand.stream("a b", max_tokens=22)
        assert text_of(events) == expected("a b", 22)
        assert events[-1] == "[DONE]"
        assert await stand.metric("hexgen2:migrations_total") == 5


async def test_migrations_are_bounded() -> None:
    async with running(TWO, limits=Limits(max_migrations=2)) as stand:
        for engine in stand.engines.values():
            engine.fault = Fault("error_event", after_tokens=4)
        *chunks, error = await stand.stream("a b", max_tokens=22)
        assert text_of(chunks) == expected("a b", 12)
        assert error["error"]["code"] == "engine_error_event"
        assert await stand.metric("hexgen2:streams_broken_off_total", reason="too_many_migrations") == 1


async def test_logprobs_offsets_run_on() -> None:
    async with running(TWO) as stand:
        whole = await stand.stream("a b", max_tokens=9, logprobs=1)
        fail_first(stand, "error_event", 4)
        again = await stand.stream("a b", max_tokens=9, logprobs=1)
        assert without_time(again) == without_time(whole)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("cut", range(1, 12))
async def test_stop_strings_across_the_seam(cut: int, keep: bool) -> None:
    """The stop string spans three tokens, so some cuts fall inside it and some into text that is held back."""
    ids = tokens.generate(tokens.encode("a b"), 12)
    stop = tokens.decode(ids[6:9])[2:-1]
    body = {"max_tokens": 12, "stop": [stop, "never"], "include_stop_str_in_output": keep}
    async with running(TWO) as stand:
        whole = await stand.stream("a b", **body)
        fail_first(stand, "error_event", cut)
        again = await stand.stream("a b", **body)
        assert text_of(again) == text_of(whole)
        assert again[-1] == "[DONE]"
        last, wanted = again[-2]["choices"][0], whole[-2]["choices"][0]
        assert (last["finish_reason"], last["stop_reason"]) == ("stop", wanted["stop_reason"]) == ("stop", stop)


@pytest.mark.parametrize("more", [{}, {"skip_special_tokens": False}])
@pytest.mark.parametrize("cut", range(1, 12, 2))
async def test_special_tokens_that_streams_leave_out(cut: int, more: dict[str, Any]) -> None:
    """One comes in the middle of the answer; `/detokenize` spells it out, also while its text is held back."""
    numbers = (f"{number} t0" for number in itertools.count())
    prompt = next(p for p in numbers if tokens.SPECIAL in tokens.generate(tokens.encode(p), 9)[3:])
    body = {"max_tokens": 12, "stop": ["never, as it is too long to come"], **more}
    async with running(TWO) as stand:
        whole = await stand.stream(prompt, **body)
        assert (" t0" in text_of(whole)) == bool(more)
        fail_first(stand, "error_event", cut)
        again = await stand.stream(prompt, **body)
        assert text_of(again) == text_of(whole)
        assert again[-1] == "[DONE]"


async def test_a_stream_waits_for_an_engine_to_come_back() -> None:
    async with running({"c0": 1.0}, emulator=SLOW) as stand:
        engine = stand.engines["c0"]
        port = engine.port
        task = asyncio.create_task(stand.stream("a b", max_tokens=40))
        await until(lambda: engine.core.generation_tokens_total > 5)
        engine.kill()
        await until(lambda: not stand.coordinator.fleet.engines["c0"].up)
        await engine.stop()
        engine.healthy = True
        engine.thaw()
        await engine.start(port)
        events = await task
        assert (text_of(events), events[-1]) == (expected("a b", 40), "[DONE]")


async def test_a_frozen_engine_s_streams_go_on() -> None:
    async with running(TWO, emulator=SLOW, timeouts=ALERT) as stand:
        tasks = [asyncio.create_task(stand.stream("a b", max_tokens=60)) for _ in range(6)]
        await until(lambda: stand.engines["c0"].core.generation_tokens_total > 30)
        stand.engines["c0"].freeze()
        for events in await asyncio.gather(*tasks):
            assert (text_of(events), events[-1]) == (expected("a b", 60), "[DONE]")
        assert await stand.metric("hexgen2:migrations_total") >= 3
        stand.engines["c0"].thaw()


async def test_only_the_end_was_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """All tokens were sent, the engine died before `[DONE]`: the stream is closed without asking anyone."""
    async with running({"c0": 1.0}) as stand:
        dies_before_usage(stand.engines["c0"], monkeypatch)
        events = await stand.stream("a b", max_tokens=6, stream_options={"include_usage": True})
        assert text_of(events) == expected("a b", 6)
        assert events[-2]["usage"] == {"prompt_tokens": 2, "completion_tokens": 6, "total_tokens": 8}
        assert events[-1] == "[DONE]"


async def test_nothing_comes_after_done() -> None:
    """The engine's `[DONE]` has been sent on; the rest of its body never comes: nobody waits for that."""
    async with running(TWO) as stand:
        fail_first(stand, "no_end", 0)
        events = await asyncio.wait_for(stand.stream("a b", max_tokens=6), QUICK.idle_s / 2)
        assert text_of(events) == expected("a b", 6)
        assert [event for event in events if event == "[DONE]"] == ["[DONE]"] == events[-1:]


async def test_kills_under_load_lose_nothing() -> None:
    """Streams and plain requests while engines die one after another: every answer is whole and right."""
    routes = {"p0>d0": 0.2, "p1>d1": 0.2, "p1>d2": 0.2, "c0": 0.2, "c1": 0.2}
    async with running(routes, emulator=SLOW, limits=Limits(max_retries=4)) as stand:

        async def one(number: int) -> bool:
            await asyncio.sleep(number * 0.005)
            prompt = f"request {number}"
            if number % 2:
                events = await stand.stream(prompt, max_tokens=40)
                return bool(text_of(events) == expected(prompt, 40) and events[-1] == "[DONE]")
            answer = await stand.complete(prompt, max_tokens=40)
            return bool(answer["choices"][0]["text"] == expected(prompt, 40))

        async def killer() -> None:
            for group in ("d0", "c0", "p0"):
                await asyncio.sleep(0.15)
                stand.engines[group].kill()

        *right, _ = await asyncio.gather(*map(one, range(120)), killer())
        assert all(right)
        moved = await stand.metric("hexgen2:migrations_total") + await stand.metric("hexgen2:retries_total")
        assert moved >= 3


OBSTACLES: list[tuple[dict[str, Any], bool, str]] = [
    ({"prompt": ["a", "b"]}, False, "several_prompts"),
    ({"prompt": "a", "n": 2}, False, "several_sequences"),
    ({"prompt": "a", "presence_penalty": 0.5}, False, "presence_penalty"),
    ({"prompt": "a", "frequency_penalty": -1}, False, "frequency_penalty"),
    ({"prompt": "a", "structured_outputs": {"regex": "a"}}, False, "structured_output"),
    ({"prompt": "a", "response_format": {"type": "json_object"}}, False, "structured_output"),
    ({"prompt": "a", "echo": True, "stop": "x"}, False, "echo"),
    ({"messages": MESSAGES, "tools": [{}]}, True, "tools"),
    ({"messages": MESSAGES, "logprobs": True}, True, "chat_extras"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, True, "prompt_is_not_text"),
]


@pytest.mark.parametrize(("body", "chat", "reason"), OBSTACLES)
def test_what_cannot_go_on(body: dict[str, Any], chat: bool, reason: str) -> None:
    assert continuation_obstacle(body, chat) == reason


@pytest.mark.parametrize(
    ("body", "chat"),
    [
        ({"prompt": [1, 2, 3], "presence_penalty": 0, "response_format": {"type": "text"}}, False),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}, True),
        ({"messages": MESSAGES, "tools": [{}], "tool_choice": "none"}, True),
        ({"messages": MESSAGES, "stop": ["a"]}, True),
    ],
)
def test_what_can_go_on(body: dict[str, Any], chat: bool) -> None:
    assert continuation_obstacle(body, chat) is None


async def test_what_cannot_go_on_ends_in_an_error_event() -> None:
    async with running(TWO, limits=Limits(seed_streams=False)) as stand:
        fail_first(stand, "error_event", 3)
        *_, error = await stand.stream("a b", max_tokens=9, presence_penalty=0.5)
        assert error["error"]["code"] == "engine_error_event"
        assert await stand.metric("hexgen2:streams_broken_off_total", reason="presence_penalty") == 1


def test_continuation_body_keeps_sampling_and_drops_the_prompt_s_shape() -> None:
    body = {
        "model": "tiny",
        "messages": MESSAGES,
        "temperature": 0.3,
        "seed": 5,
        "min_tokens": 6,
        "max_completion_tokens": 10,
        "stop": "x",
        "logprobs": False,
        "new_field": 1,
        "stream_options": {"include_usage": True},
    }
    journal = Journal(body, chat=True)
    journal.prompt_ids, journal.token_ids = [1, 2], [3, 4]
    assert tokens_left(body, True, journal, 100) == 8
    assert tokens_left(body, True, journal, 9) == 5
    assert tokens_left({}, True, journal, None) is None
    assert tokens_left({}, False, journal, None) == 14
    assert continuation_body(body, True, journal, 8) == {
        "model": "tiny",
        "temperature": 0.3,
        "seed": 5,
        "stop": "x",
        "new_field": 1,
        "prompt": [1, 2, 3, 4],
        "max_tokens": 8,
        "min_tokens": 4,
        "stream": True,
        "return_token_ids": True,
    }


@given(st.text('ab"\\,:[]{} é', max_size=60), st.lists(st.integers(0, 10**6), max_size=5))
def test_ids_are_taken_out_of_the_bytes_only_where_they_are_ids(text: str, ids: list[int]) -> None:
    """Text that looks like the field is left alone; without its ids the event is as if none had been asked
    for.
    """
    tricky = text + '"token_ids":[1,2],' + json.dumps({"token_ids": [5]})
    journal = Journal({"prompt": "a"}, chat=False)

    def event(shown: list[int] | None) -> bytes:
        choice = {"index": 0, "text": tricky, "prompt_token_ids": shown, "token_ids": shown}
        body = {"id": "x", "choices": [choice]}
        return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"

    assert journal.note(event(ids)) == event(None)
    assert journal.token_ids == ids
    assert journal.prompt_ids == ids


def stopped(text: str, stops: list[str], keep: bool) -> tuple[str, str | None]:
    """The text as one engine gives it, character by character."""
    for end in range(len(text) + 1):
        for stop in stops:
            if text[:end].endswith(stop):
                return text[: end if keep else end - len(stop)], stop
    return text, None


@given(
    st.text("ab", max_size=14),
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3, unique=True),
    st.integers(0, 14),
    st.booleans(),
    st.data(),
)
def test_the_seam_equals_an_unbroken_engine(
    text: str, stops: list[str], cut: int, keep: bool, data: st.DataObject
) -> None:
    old, new = text[:cut], text[cut:]
    if stopped(old, stops, keep)[1] is not None:
        return  # the first engine would have ended by itself
    hold = 0 if keep else max(map(len, stops)) - 1
    # What starts and ends after the seam is the other engine's to find.
    if any(stop in new for stop in stops):
        return
    sent = max(0, len(old) - hold)
    seam = StopSeam(old, sent, stops, keep)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(new)), max_size=4)) | {0, len(new)})
    pieces = [new[begin:end] for begin, end in itertools.pairwise(cuts)] or [""]
    shown, reason = old[:sent], None
    for index, piece in enumerate(pieces):
        more, reason = seam.add(piece, last=index == len(pieces) - 1)
        shown += more
        if reason is not None:
            break
    assert (shown, reason) == stopped(text, stops, keep)
