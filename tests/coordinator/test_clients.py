"""The official `openai` client and curl work unchanged."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import openai
import pytest

from tests.waiting import HUNG_S

from .conftest import MODEL, Stand, expected, parse_events, text_of


@pytest.fixture
async def client(pair: Stand) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=pair.url + "/v1", api_key="none", max_retries=0) as made:
        yield made


async def test_completions(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model=MODEL, prompt="a b", max_tokens=5, temperature=0, logprobs=1)
    assert answer.choices[0].text == expected("a b", 5)
    stream = await client.completions.create(model=MODEL, prompt="a b", max_tokens=5, stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == expected("a b", 5)


async def test_chat(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "hi"}], max_completion_tokens=6
    )
    text = answer.choices[0].message.content
    assert text
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 6
    stream = await client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "hi"}],
        max_completion_tokens=6,
        stream=True,
        stream_options={"include_usage": True},
    )
    streamed, tokens = "", None
    async for chunk in stream:
        if chunk.choices:
            streamed += chunk.choices[0].delta.content or ""
        if chunk.usage:
            tokens = chunk.usage.completion_tokens
    assert (streamed, tokens) == (text, 6)


async def test_models_and_errors(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == [MODEL, "alias"]
    with pytest.raises(openai.NotFoundError) as missing:
        await client.completions.create(model="gpt-9", prompt="a")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError):
        await client.completions.create(model=MODEL, prompt="a", max_tokens=10**9)


async def test_a_broken_stream_raises(client: openai.AsyncOpenAI, pair: Stand) -> None:
    from hexgen2.emulator import Fault

    for engine in pair.engines.values():
        engine.fault = Fault("error_event", after_tokens=3)
    pair.engines["p0"].fault = None
    with pytest.raises(openai.APIError):
        async for _ in await client.completions.create(
            model=MODEL, prompt="a", stream=True, presence_penalty=1
        ):
            pass


CURL = shutil.which("curl")


async def curl(*arguments: str) -> tuple[int, str]:
    """(exit code, standard output)."""
    assert CURL is not None
    process = await asyncio.create_subprocess_exec(
        *(CURL, "-sS", "--max-time", "60", *arguments), stdout=asyncio.subprocess.PIPE
    )
    text, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, text.decode()


@pytest.mark.skipif(CURL is None, reason="curl is not installed")
async def test_curl(pair: Stand, tmp_path: Path) -> None:
    """Plain, streamed, a body large enough to be announced (Expect: 100-continue), HTTP/1.0, and a refusal."""
    url, json_type = pair.url + "/v1/completions", "Content-Type: application/json"
    code, text = await curl(url, "-H", json_type, "-d", '{"prompt": "a b", "max_tokens": 3}')
    assert (code, json.loads(text)["choices"][0]["text"]) == (0, expected("a b", 3))
    code, text = await curl(
        url, "-N", "-H", json_type, "-d", '{"prompt": "a b", "max_tokens": 3, "stream": true}'
    )
    assert (code, text_of(parse_events(text))) == (0, expected("a b", 3))
    large = tmp_path / "large.json"
    large.write_text(json.dumps({"prompt": "word " * 400_000, "max_tokens": 1_000_000}))
    code, text = await curl(url, "-H", json_type, "-d", f"@{large}")
    assert (code, json.loads(text)["error"]["code"]) == (0, 400)  # the engine's: longer than its context
    code, text = await curl(url, "--http1.0", "-H", json_type, "-d", '{"prompt": "a", "max_tokens": 2}')
    assert (code, json.loads(text)["choices"][0]["text"]) == (0, expected("a", 2))
    code, text = await curl(pair.url + "/v1/models/none", "-w", "%{http_code}")
    assert (code, text[-3:]) == (0, "404")


async def test_a_client_of_http_1_0_gets_a_stream_without_chunks(pair: Stand) -> None:
    body = json.dumps({"model": MODEL, "prompt": "a b", "max_tokens": 20, "stream": True}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", int(pair.url.rsplit(":", 1)[1]))
    writer.write(b"POST /v1/completions HTTP/1.0\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
    head, _, text = (await asyncio.wait_for(reader.read(), HUNG_S)).partition(b"\r\n\r\n")
    writer.close()
    assert b"chunked" not in head.lower()
    events = parse_events(text.decode())
    assert text_of(events) == expected("a b", 20)
    assert events[-1] == "[DONE]"
