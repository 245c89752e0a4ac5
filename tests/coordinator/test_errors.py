"""Bad requests, keys and limits: OpenAI's bodies and statuses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from hexgen2.coordinator import ApiKeys, Limits
from hexgen2.specs.errors import InputError
from tests.waiting import HUNG_S

from .conftest import QUICK, Stand, running


async def test_unknown_model(pair: Stand) -> None:
    for path in ("/v1/completions", "/v1/chat/completions"):
        status, body, _ = await pair.post(path, {"model": "gpt-9", "prompt": "a"})
        assert status == 404
        assert body == {
            "error": {
                "message": "The model `gpt-9` does not exist or you do not have access to it.",
                "type": "invalid_request_error",
                "param": None,
                "code": "model_not_found",
            }
        }
    async with pair.http.get(pair.url + "/v1/models/gpt-9") as response:
        assert response.status == 404
    assert pair.received("p0") == []


@pytest.mark.parametrize(
    ("raw", "status", "word"),
    [
        (b"{", 400, "JSON"),
        (b"", 400, "JSON"),
        (b"\xff\xfe{", 400, "JSON"),
        (b"[1]", 400, "object"),
        (b"[" * 100_000, 400, "JSON"),
        (b'{"model": 7}', 404, "7"),
        (b'{"model": ["tiny"]}', 404, "tiny"),
        (b'{"prompt": "a", "stream": "yes"}', 400, "stream"),
    ],
)
async def test_bad_bodies(pair: Stand, raw: bytes, status: int, word: str) -> None:
    got, body, headers = await pair.post("/v1/completions", raw)
    assert got == status
    assert word in body["error"]["message"]
    assert headers["X-Request-Id"]


async def test_the_engine_s_refusal_is_passed_on(pair: Stand) -> None:
    """Both the prefill engine's and the decode engine's, without a retry."""
    status, body, _ = await pair.post("/v1/completions", {"prompt": ""})
    assert (status, body["error"]["type"]) == (400, "BadRequestError")
    status, body, _ = await pair.post("/v1/completions", {"prompt": "a", "max_tokens": 4, "min_tokens": 9})
    assert (status, body["error"]["param"]) == (400, "min_tokens")
    status, body, _ = await pair.post("/v1/completions", {"prompt": "a", "max_tokens": 10**7, "stream": True})
    assert status == 400
    assert "maximum context" in body["error"]["message"]
    assert await pair.metric("hexgen2:retries_total") == 0


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "unknown_url"),
        ("POST", "/v1/embeddings", 404, "endpoint_not_served"),
        ("GET", "/v1/completions", 405, None),
    ],
)
async def test_other_addresses(pair: Stand, method: str, path: str, status: int, code: str | None) -> None:
    async with pair.http.request(method, pair.url + path) as response:
        assert response.status == status
        assert (await response.json())["error"]["code"] == code


async def test_large_bodies_are_refused() -> None:
    async with running({"c0": 1.0}, limits=Limits(max_body_bytes=2000)) as stand:
        status, body, _ = await stand.post("/v1/completions", {"prompt": "x" * 3000})
        assert (status, body["error"]["code"]) == (413, "request_too_large")
        assert stand.received("c0") == []


async def test_slow_bodies_are_refused() -> None:
    import asyncio

    async with running({"c0": 1.0}, timeouts=QUICK.model_copy(update={"body_s": 0.1})) as stand:
        port = int(stand.url.rsplit(":", 1)[1])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{")
        async with asyncio.timeout(HUNG_S):
            assert b"408" in await reader.readline()
        writer.close()


async def test_api_keys() -> None:
    async with running({"c0": 1.0}, keys=ApiKeys(["one", "two-ü"])) as stand:
        bad: list[Mapping[str, str]] = [{}, {"Authorization": "Bearer x"}, {"Authorization": "one"}]
        for headers in [*bad, {"Authorization": "Basic one"}, {"Authorization": "Bearer "}]:
            status, body, _ = await stand.post("/v1/completions", {"prompt": "a"}, **headers)
            assert (status, body["error"]["code"]) == (401, "invalid_api_key")
        async with stand.http.get(stand.url + "/v1/models") as response:
            assert response.status == 401
        async with stand.http.get(stand.url + "/health") as response:
            assert response.status == 200
        for key in ("one", "two-ü"):
            status, _, _ = await stand.post("/v1/completions", {"prompt": "a"}, Authorization=f"bearer {key}")
            assert status == 200


def test_key_files(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\n\n  alpha \nbeta\n")
    keys = ApiKeys.from_file(file)
    known = [keys.who(f"Bearer {key}") for key in ("alpha", "beta", "# ours", "")]
    assert known[2:] == [None, None]
    assert None not in known[:2]
    assert known[0] != known[1]
    file.write_text("# nothing\n")
    with pytest.raises(InputError, match="no API key"):
        ApiKeys.from_file(file)
    with pytest.raises(InputError, match="cannot be read"):
        ApiKeys.from_file(tmp_path / "none")


def test_error_bodies_are_json() -> None:
    from hexgen2.coordinator.errors import no_path

    event: Any = json.loads(no_path().event().removeprefix(b"data: "))
    assert event["error"]["code"] == "no_engine_available"
