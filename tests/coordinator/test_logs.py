"""Logs carry request ids and no prompt."""

from __future__ import annotations

import json
import logging

import pytest

from hexgen2.coordinator import Limits
from hexgen2.coordinator.logs import JsonLines, Text, WithRequestId, current_request
from hexgen2.emulator import Fault

from .conftest import running


def record(message: str, *arguments: object) -> logging.LogRecord:
    made = logging.LogRecord("hexgen2.x", logging.WARNING, "f.py", 1, message, arguments, None)
    WithRequestId().filter(made)
    return made


def test_json_lines() -> None:
    token = current_request.set("id-7")
    try:
        shown = json.loads(JsonLines().format(record('a "%s"\n', "b")))
    finally:
        current_request.reset(token)
    assert (shown["message"], shown["level"], shown["request_id"]) == ('a "b"\n', "warning", "id-7")
    assert "request_id" not in json.loads(JsonLines().format(record("plain")))


def test_text() -> None:
    token = current_request.set("id-7")
    try:
        assert Text().format(record("hello")).endswith("WARNING hexgen2.x: hello [id-7]")
    finally:
        current_request.reset(token)


async def test_failures_are_logged_with_the_id_and_without_the_prompt(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    caplog.handler.addFilter(WithRequestId())
    async with running({"c0": 0.5, "c1": 0.5}, limits=Limits(max_retries=1)) as stand:
        stand.engines["c0"].fault = Fault("http_500")
        await stand.post("/v1/completions", {"prompt": "very secret words"}, X_Request_Id="id-8")
    tried = [r for r in caplog.records if "trying" in r.getMessage()]
    assert [getattr(record, "request_id", "") for record in tried] == ["id-8"]
    ours = [r for r in caplog.records if r.name.startswith("hexgen2")]
    assert not any("secret" in r.getMessage() for r in ours)
