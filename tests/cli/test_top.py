"""`hexgen2 top` over a running coordinator: once, as JSON, until Ctrl-C, and what a user may get wrong."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import signal
import sys
from collections.abc import AsyncIterator

import pytest
from tests.coordinator.conftest import Stand, running

from hexgen2.cli.main import main
from hexgen2.coordinator import ApiKeys
from hexgen2.report.top import POINTS, sparkline


@pytest.fixture
async def stand() -> AsyncIterator[Stand]:
    async with running({"p0>d0": 0.5, "p0>d1": 0.5}) as stand:
        await stand.stream(max_tokens=4)
        stand.coordinator.live.sample()  # not to wait for the next second
        yield stand


async def top(*arguments: str) -> int:
    return await asyncio.to_thread(main, ["top", *arguments])


@pytest.mark.parametrize("end", ["", "/", "/v1", "/live"])
async def test_once(end: str, stand: Stand, capsys: pytest.CaptureFixture[str]) -> None:
    assert await top(stand.url + end, "--once") == 0
    shown = capsys.readouterr().out
    for part in ("tiny  serving", "p0 → d0", "TTFT P50", "50.0%", "1 answered, 0 refused"):
        assert part in shown
    assert max(map(len, shown.splitlines())) <= 120


async def test_json_is_one_document(stand: Stand, capsys: pytest.CaptureFixture[str]) -> None:
    assert await top(stand.url, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["totals"]["answered"] == 1
    assert "history" not in found


async def test_a_key_is_given_where_one_is_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running({"p0>d0": 1.0}, keys=ApiKeys(["right"])) as stand:
        assert await top(stand.url, "--once") == 2
        assert "asks for an API key; give one with --api-key" in capsys.readouterr().err
        assert await top(stand.url, "--once", "--api-key", "right") == 0
        monkeypatch.setenv("HEXGEN2_API_KEY", "right")
        assert await top(stand.url, "--once") == 0


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("127.0.0.1:8000", "is no http:// or https:// address"),
        ("ftp://127.0.0.1", "is no http:// or https:// address"),
        ("http://", "is no http:// or https:// address"),
        ("http://127.0.0.1:99999", "is no http:// or https:// address"),
        ("http://127.0.0.1:1", "does not answer"),
        ("http://[x", "is no http:// or https:// address"),
        ("http://a b", "does not answer"),
    ],
)
async def test_a_wrong_address_is_one_line(url: str, problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert await top(url, "--once") == 2
    told = capsys.readouterr().err
    assert problem in told
    assert told.count("\n") == 1


async def test_another_service_is_told_apart(stand: Stand, capsys: pytest.CaptureFixture[str]) -> None:
    assert await top(stand.engines["p0"].url, "--once") == 2
    assert "answers 404; give the address of `hexgen2 serve`" in capsys.readouterr().err


async def test_it_watches_until_interrupted(stand: Stand) -> None:
    """In a terminal of its own: it shows the figures, Ctrl-C ends it with 0 and the last of them."""
    ours, theirs = pty.openpty()
    arguments = [sys.executable, "-m", "hexgen2.cli.main", "top", stand.url, "--every", "0.05"]
    process = await asyncio.create_subprocess_exec(
        *arguments,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
    )
    os.close(theirs)
    seen = b""

    async def until(part: bytes) -> None:
        nonlocal seen
        async with asyncio.timeout(60):
            while part not in seen:
                seen += await asyncio.to_thread(os.read, ours, 65536)

    await until(b"\x1b[?1049h")  # it took the whole screen
    await until(b"TTFT P50")
    process.send_signal(signal.SIGINT)
    await until(b"\x1b[?1049l")
    seen = seen.split(b"\x1b[?1049l")[-1]
    await until(b"since the start")
    assert await process.wait() == 0
    assert b"Traceback" not in seen
    os.close(ours)


def test_a_line_is_drawn_from_zero_to_its_largest() -> None:
    assert sparkline([]) == ""
    assert sparkline([0.0, 0.0]) == "▁▁"
    assert sparkline([0.0, None, 7.0, 3.5]) == "▁ █▅"
    assert len(sparkline([1.0] * 300)) <= POINTS
