"""Streams that cannot go on from their token ids are run anew, and what was sent is passed over."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexgen2.coordinator import Limits
from hexgen2.coordinator.journal import Journal
from hexgen2.coordinator.replay import Differs, Record, Replay, is_repeatable
from hexgen2.coordinator.transcript import Said
from hexgen2.emulator import Fault, tokens

from .conftest import MODEL, Stand, expected, parse_events, running, text_of
from .test_migration import CHAT, COMPLETIONS, MESSAGES, TWO, dies_before_usage, fail_first, without_time

BODIES: list[tuple[str, dict[str, Any], str]] = [
    (COMPLETIONS, {"prompt": "a b", "presence_penalty": 0.5}, "presence_penalty"),
    (COMPLETIONS, {"prompt": "a b", "response_format": {"type": "json_object"}, "logprobs": 1}, "logprobs"),
    (COMPLETIONS, {"prompt": [5, 6], "echo": True}, "echo"),
    (COMPLETIONS, {"prompt": "a b", "echo": True, "logprobs": 1, "return_token_ids": True}, "echo"),
    (COMPLETIONS, {"prompt": "a b", "n": 3}, "n"),
    (COMPLETIONS, {"prompt": ["a b", "c"], "return_token_ids": True}, "prompts"),
    (CHAT, {"messages": MESSAGES, "tools": [{"type": "function"}]}, "tools"),
    (CHAT, {"messages": MESSAGES, "logprobs": True, "top_logprobs": 2}, "chat logprobs"),
    (CHAT, {"messages": MESSAGES, "frequency_penalty": 1, "stop": ["zz"], "n": 2}, "n"),
]


@pytest.mark.parametrize("kind", ["die", "cut", "error_event", "finish_error"])
@pytest.mark.parametrize("cut", [1, 6, 11])
@pytest.mark.parametrize(("path", "fields", "name"), BODIES, ids=[f"{path[-4:]}-{n}" for path, _, n in BODIES])
async def test_greedy_streams_go_on_whatever_they_use(
    kind: Any, cut: int, path: str, fields: dict[str, Any], name: str
) -> None:
    del name
    async with running(TWO) as stand:
        body = fields | {"temperature": 0, "max_tokens": 12, "stream_options": {"include_usage": True}}
        whole = sums(await stand.stream(path=path, **body))
        fail_first(stand, kind, cut)
        again = await stand.stream(path=path, **body)
        assert len({event["id"] for event in again if event != "[DONE]"}) == 1
        assert sums(again) == whole
        assert (
            await stand.metric("hexgen2:replays_total") == await stand.metric("hexgen2:migrations_total") == 1
        )


def sums(events: list[Any]) -> Any:
    """What a stream says, whatever the order in which its choices come."""
    assert events[-1] == "[DONE]"
    by_choice: dict[int, list[Any]] = {}
    rest = []
    for event in without_time(events[:-1]):
        if event["choices"]:
            (choice,) = event["choices"]
            by_choice.setdefault(choice["index"], []).append(choice)
            rest += [event["prompt_token_ids"]] if event.get("prompt_token_ids") else []
        else:
            rest.append(event)
    return by_choice, rest


async def test_one_stream_is_run_anew_several_times() -> None:
    async with running(TWO) as stand:
        fields = {"max_tokens": 20, "temperature": 0, "presence_penalty": 1}
        whole = await stand.stream("a b", **fields)
        stand.engines["c0"].fault = Fault("error_event", after_tokens=3, times=1)
        stand.engines["c1"].fault = Fault("error_event", after_tokens=9, times=2)
        again = await stand.stream("a b", **fields)
        assert without_time(again) == without_time(whole)
        assert text_of(again) == expected("a b", 20)
        assert await stand.metric("hexgen2:replays_total") >= 2


UNSEEDED: list[dict[str, Any]] = [
    {"presence_penalty": 0.5},
    {"n": 2, "temperature": 1.0},
    {"structured_outputs": {"regex": ".*"}, "top_p": 0.9},
    {"prompt": ["a b", "c"]},
]


@pytest.mark.parametrize("fields", UNSEEDED, ids=["penalties", "choices", "structured", "prompts"])
async def test_a_stream_without_a_seed_gets_one_and_goes_on(fields: dict[str, Any]) -> None:
    async with running(TWO) as stand:
        body = {"prompt": "a b", "max_tokens": 9} | fields
        whole = await stand.stream(**body)
        fail_first(stand, "error_event", 3)
        assert sums(await stand.stream(**body)) == sums(whole)
        assert await stand.metric("hexgen2:replays_total") == 1
        seeds = [sent["seed"] for group in stand.engines for sent in stand.received(group)]
        assert len(seeds) == 3
        assert len(set(seeds)) == 2, "its own, and the same for both runs"


@pytest.mark.parametrize("fields", [{}, {"temperature": 0, "presence_penalty": 1}, {"stream": False, "n": 2}])
async def test_no_seed_where_none_is_needed(fields: dict[str, Any]) -> None:
    """Streams that go on from their tokens, greedy ones, and answers that are no streams."""
    async with running({"c0": 1.0}) as stand:
        body = {"model": MODEL, "prompt": "a", "max_tokens": 2, "stream": True} | fields
        assert (await stand.post("/v1/completions", body))[0] == 200
        assert "seed" not in stand.received("c0")[0]


async def test_what_is_neither_greedy_nor_seeded_ends_in_an_error_where_seeds_are_off() -> None:
    async with running(TWO, limits=Limits(seed_streams=False)) as stand:
        fail_first(stand, "error_event", 3)
        *_, error = await stand.stream("a b", max_tokens=9, presence_penalty=0.5, temperature=0.7)
        assert error["error"]["code"] == "engine_error_event"
        assert await stand.metric("hexgen2:streams_broken_off_total", reason="presence_penalty") == 1
        assert await stand.metric("hexgen2:replays_total") == 0


@pytest.mark.parametrize("cut", [3, 8])
async def test_a_run_that_differs_ends_in_an_error(cut: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A seed that does not repeat: what was sent stays as it was, and the client hears that it is not whole."""
    async with running(TWO) as stand:
        fail_first(stand, "error_event", cut)
        runs = iter((0, 1))

        class Unrepeatable(tokens.TokenModel):
            def __init__(self, prompt: Sequence[int], allowed: Sequence[int]) -> None:
                super().__init__([*prompt, next(runs)], allowed)

        monkeypatch.setattr("hexgen2.emulator.engine.TokenModel", Unrepeatable)
        *chunks, error = await stand.stream("a b", max_tokens=9, presence_penalty=0.5, seed=7)
        first = tokens.generate([*tokens.encode("a b"), 0], cut)
        assert text_of(chunks) == tokens.decode(first)
        assert error["error"]["code"] == "engine_error_event"
        assert await stand.metric("hexgen2:streams_broken_off_total", reason="replay_differs") == 1


async def test_all_was_said_but_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """With every token sent, nobody is asked again, and usage is counted here."""
    async with running({"c0": 1.0}) as stand:
        dies_before_usage(stand.engines["c0"], monkeypatch)
        events = await stand.stream(
            ["a b", "c"], max_tokens=6, temperature=0, n=2, stream_options={"include_usage": True}
        )
        assert events[-2]["usage"] == {"prompt_tokens": 3, "completion_tokens": 24, "total_tokens": 27}
        assert events[-1] == "[DONE]"


@pytest.mark.parametrize(
    ("body", "repeats"),
    [
        ({"temperature": 0}, True),
        ({"temperature": 0.0, "n": 2}, True),
        ({"seed": 3, "temperature": 1}, True),
        ({}, False),
        ({"temperature": None}, False),
        ({"temperature": False}, False),
        ({"temperature": 0.1}, False),
    ],
)
def test_what_repeats(body: dict[str, Any], repeats: bool) -> None:
    assert is_repeatable(body) is repeats


@pytest.mark.parametrize("odd", [{"n": "3"}, {"n": -1}, {"prompt": []}, {"stream_options": 3}, {"n": None}])
def test_odd_bodies_are_the_engine_s_to_refuse(odd: dict[str, Any]) -> None:
    Journal({"prompt": "a", "temperature": 0, "logprobs": 1, "presence_penalty": 1} | odd, chat=False)


# Any cut into chunks

Chunk = dict[str, Any]
TOOL_IDS = iter(range(10**9))


@st.composite
def generations(draw: st.DrawFn) -> list[list[Chunk]]:
    """One generation, with reasoning, content and tool calls, cut into chunks in two ways."""
    count = draw(st.integers(1, 12))
    pieces: list[tuple[str, str, int]] = []  # (kind, text, tool call) of each token
    for place in range(count):
        kind = draw(st.sampled_from(["reasoning", "content", "tool", "none"]))
        pieces.append((kind, draw(st.text("ab{}é", max_size=3)), place % 2))
    runs = []
    for _ in range(2):
        cuts = sorted(draw(st.sets(st.integers(1, count), max_size=count)) | {0, count})
        run_id = next(TOOL_IDS)
        known: set[int] = set()
        chunks: list[Chunk] = [
            {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        ]
        for begin, end in itertools.pairwise(cuts):
            delta: dict[str, Any] = {}
            for kind, text, number in pieces[begin:end]:
                if kind == "tool":
                    call: dict[str, Any] = {"index": number, "function": {"arguments": text}}
                    if number not in known:
                        known.add(number)
                        call |= {"id": f"call-{run_id}-{number}", "type": "function"}
                        call["function"]["name"] = f"f{number}"
                    delta.setdefault("tool_calls", []).append(call)
                elif kind != "none":
                    delta[kind] = delta.get(kind, "") + text
            chunks.append(
                {
                    "index": 0,
                    "delta": delta,
                    "logprobs": {"content": [{"token": n} for n in range(begin, end)]},
                    "finish_reason": "stop" if end == count else None,
                    "token_ids": list(range(begin, end)),
                }
            )
        runs.append(chunks)
    return runs


def event(choice: Chunk, id_: str) -> bytes:
    body = {"id": id_, "created": 1, "choices": [choice]}
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"


def said(shown: bytes) -> tuple[Said, list[str]]:
    """The sums of what a client saw, and the ids of the tool calls."""
    total, calls = Said(), []
    for one in parse_events(shown.decode()):
        if one != "[DONE]":
            for choice in one["choices"]:
                total.add(choice)
                found = choice["delta"].get("tool_calls") or ()
                calls += [call["id"] for call in found if "id" in call]
    return total, calls


@given(generations(), st.data())
def test_any_two_cuts_of_one_generation_fit(runs: list[list[Chunk]], data: st.DataObject) -> None:
    """However far the first run came, and however the second is cut: nothing is lost, doubled or changed."""
    first, second = runs
    came = data.draw(st.integers(1, len(first) - 1))
    record = Record({"return_token_ids": data.draw(st.booleans())}, chat=True)
    shown = b"".join(record.note(event(choice, "one")) for choice in first[:came])
    replay = Replay(record, {"id": "one"})
    later = b"".join(replay.block(event(choice, "two")) for choice in second)
    later += replay.block(b"data: [DONE]\n\n")
    assert b'"two"' not in later
    (got, calls), (whole, _) = said(shown + later), said(b"".join(event(choice, "x") for choice in second))
    assert got.texts == {key: text for key, text in whole.texts.items() if text or key == "content"} | {
        key: "" for key in got.texts if not got.texts[key]
    }
    assert (got.arguments, got.names) == (whole.arguments, whole.names)
    assert (got.role, got.finish, got.logprobs) == (True, "stop", whole.logprobs)
    assert got.ids == (whole.ids if not record.asks_for_ids else [])
    assert len(calls) == len(whole.names), "each call has the id under which the client met it"
    assert record.finished
    assert record.generated == len(whole.ids)


@given(generations(), st.data())
def test_a_changed_token_is_found(runs: list[list[Chunk]], data: st.DataObject) -> None:
    first, second = runs
    came = data.draw(st.integers(2, len(first)))
    record = Record({}, chat=True)
    for choice in first[:came]:
        record.note(event(choice, "one"))
    wrong = data.draw(st.integers(0, record.generated - 1))
    for choice in second:
        choice["token_ids"] = [-1 if token == wrong else token for token in choice.get("token_ids", ())]
    blocks = b"".join(event(choice, "two") for choice in second)
    with pytest.raises(Differs):
        Replay(record, {}).block(blocks)


def test_a_run_that_ends_too_soon_is_found() -> None:
    def chunk(ids: list[int], finish: str | None = None) -> Chunk:
        return {"index": 0, "text": "x" * len(ids), "finish_reason": finish, "token_ids": ids}

    record = Record({}, chat=False)
    record.note(event(chunk([1, 2, 3]), "one"))
    with pytest.raises(Differs):
        Replay(record, {}).block(event(chunk([1, 2], "stop"), "two"))
    with pytest.raises(Differs):
        Replay(record, {}).block(b"data: [DONE]\n\n")


async def test_reasoning_that_turns_up_makes_a_record_of_the_whole_stream(pair: Stand) -> None:
    del pair
    deltas = [{"role": "assistant", "content": ""}, {"reasoning": "hm"}, {"content": "yes"}]
    journal = Journal({"messages": MESSAGES, "temperature": 0}, chat=True)
    shown = b"".join(
        journal.note(event({"index": 0, "delta": delta, "finish_reason": None, "token_ids": [n]}, "one"))
        for n, delta in enumerate(deltas)
    )
    assert journal.obstacle == "reasoning"
    assert journal.record is not None
    assert journal.record.said[0].texts == {"content": "yes", "reasoning": "hm"}
    assert journal.record.said[0].ids == [0, 1, 2]
    assert b"[0]" not in shown
    other = Journal({"messages": MESSAGES}, chat=True)
    for n, delta in enumerate(deltas):
        block = other.note(event({"index": 0, "delta": delta, "finish_reason": None, "token_ids": [n]}, "one"))
        assert b'"token_ids":null' in block, "the client did not ask for them"
    assert other.record is None
