"""Events are cut and looked into without harm, wherever the reads fall."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexgen2.coordinator.journal import Journal
from hexgen2.coordinator.stream import (
    DONE,
    EventBlocks,
    completion_tokens,
    event_json,
    events,
    failure_in,
    finished_with_error,
)

texts = st.text(max_size=40) | st.sampled_from(['"error"', '"finish_reason":"error"', 'data: {"error": 1}\n\n'])


def chunk(text: str, finish: str | None = None) -> bytes:
    body = {"id": "x", "choices": [{"index": 0, "text": text, "finish_reason": finish}]}
    return b"data: " + json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n"


@given(st.lists(texts, max_size=8), st.data())
def test_blocks_hold_whole_events_in_order(parts: list[str], data: st.DataObject) -> None:
    stream = b"".join(map(chunk, parts)) + DONE
    blocks, cutter, at = [], EventBlocks(), 0
    while at < len(stream):
        step = data.draw(st.integers(1, len(stream) - at))
        block = cutter.feed(stream[at : at + step])
        assert block == b"" or block.endswith(b"\n\n")
        blocks.append(block)
        at += step
    assert b"".join(blocks) == stream
    assert cutter.rest == b""
    bodies = [event_json(event) for event in events(stream)]
    assert [body["choices"][0]["text"] for body in bodies if body] == parts


@given(st.lists(texts, max_size=8))
def test_text_never_looks_like_a_failure(parts: list[str]) -> None:
    assert failure_in(b"".join(map(chunk, parts)) + DONE) is None
    assert not any(finished_with_error(chunk(part)) for part in parts)


@pytest.mark.parametrize(
    ("failure", "kind", "message"),
    [
        (b'data: {"error": {"message": "died", "code": 500}}\n\n', "error_event", "died"),
        (b'data: {"error":"plain"}\n\n', "error_event", "plain"),
        (b'data: {"object":"error","message":"old style"}\n\n', "error_event", "old style"),
        (chunk("", "error"), "finish_error", "the generation ended with an error"),
    ],
)
def test_failures_are_seen_and_cut_off(failure: bytes, kind: str, message: str) -> None:
    assert failure_in(chunk("a") + chunk("b") + failure + DONE) == (chunk("a") + chunk("b"), kind, message)
    assert failure_in(failure + DONE) == (b"", kind, message)


@pytest.mark.parametrize(
    ("answer", "count"),
    [
        (b'{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":17}}', 17),
        (b'{"choices":[]}', None),
        (json.dumps({"text": '"completion_tokens": 9', "usage": {"completion_tokens": 2}}).encode(), 2),
    ],
)
def test_completion_tokens(answer: bytes, count: int | None) -> None:
    assert completion_tokens(answer) == count


def test_plain_answers_that_failed() -> None:
    assert finished_with_error(b'{"choices":[{"finish_reason": "error"}]}')
    assert not finished_with_error(json.dumps({"text": '{"finish_reason":"error"}'}).encode())


IDS = st.lists(st.integers(0, 10**6), max_size=3)


@given(st.lists(st.tuples(IDS, st.booleans()), min_size=1, max_size=4), IDS, st.booleans(), st.booleans())
def test_ids_are_noted_however_they_are_written(
    chunks: list[tuple[list[int], bool]], prompt: list[int], spaced: bool, shows: bool
) -> None:
    """One event a block or several, compact JSON or not: the same ids, and none shown unless asked for."""
    journal = Journal({"prompt": "a", "return_token_ids": shows}, chat=False)
    pending, first, separators = b"", True, (", ", ": ") if spaced else (",", ":")
    for number, (ids, alone) in enumerate(chunks):
        last = number == len(chunks) - 1
        choice = {
            "text": '"token_ids":[7]',
            "finish_reason": "length" if last else None,
            "prompt_token_ids": prompt if first else None,
            "token_ids": ids,
        }
        first = False
        pending += b"data: " + json.dumps({"choices": [choice]}, separators=separators).encode() + b"\n\n"
        if alone or last:
            shown = [json.loads(event[6:]) for event in journal.note(pending).split(b"\n\n") if event]
            kept = [json.loads(event[6:]) for event in pending.split(b"\n\n") if event]
            for got, given_ in zip(shown, kept, strict=True):
                wanted = given_["choices"][0]
                if not shows:
                    wanted |= {"token_ids": None, "prompt_token_ids": None}
                assert got["choices"][0] == wanted
            pending = b""
    assert journal.token_ids == [id_ for ids, _ in chunks for id_ in ids]
    assert journal.prompt_ids == prompt
    assert journal.finished
