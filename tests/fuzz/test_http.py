"""Bytes that are hardly HTTP: the coordinator answers or hangs up, without any 5xx, and lives on."""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence
from urllib.parse import urlsplit

import pytest
import requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.coordinator.conftest import Stand
from tests.waiting import HUNG_S

PATHS = st.sampled_from(
    [
        "/v1/completions",
        "/v1/completions",
        "/v1/chat/completions",
        "/tokenize",
        "/health",
        "/v1/models/x",
        "/%00",
    ]
)
NAMES = st.sampled_from(
    [
        "X-Request-Id",
        "Authorization",
        "Content-Type",
        "Cookie",
        "Accept-Encoding",
        "Expect",
        "Priority",
        "traceparent",
        "X-Any",
    ]
)
# Bytes that HTTP allows in a header, most of them no UTF-8; and once in a while any at all.
ALLOWED = st.lists(st.sampled_from([*range(0x20, 0x7F), *range(0x80, 0x100)]), max_size=40).map(bytes)
VALUES = st.one_of(ALLOWED, ALLOWED, ALLOWED, st.binary(max_size=40))
GOOD = b'{"prompt": "a", "max_tokens": 2}'
BODIES = st.one_of(
    st.binary(max_size=200),
    st.just(GOOD),
    st.sampled_from([b"", b"null", b"[]", b"{", b'{"prompt": "\\ud800"}', b"NaN"]),
    st.sampled_from([b"[" * 100_000, b'{"a":' * 5000]),
    st.sampled_from([b'{"model": "\\ud800"}', b'{"priority": 1e999}', b'{"priority": true, "prompt": "a"}']),
)
LENGTHS = st.sampled_from(
    ["right", "right", "right", "chunked", "short", "long", "none", "negative", "bad chunks", "words"]
)


def exchange(stand: Stand, sent: bytes) -> bytes:
    """What the coordinator answers; nothing where it hangs up, or goes on waiting for the rest."""
    address = urlsplit(stand.url)
    with socket.create_connection((address.hostname, address.port), timeout=HUNG_S) as connection:
        try:
            connection.sendall(sent)
            connection.settimeout(0.3)
            received = b""
            while data := connection.recv(65536):
                received += data
        except (TimeoutError, ConnectionError):
            return received
    return received


def body_headers(kind: str, body: bytes) -> tuple[bytes, bytes]:
    """The framing headers, and the body as it goes over the wire."""
    if kind == "chunked":
        return b"Transfer-Encoding: chunked\r\n", b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    if kind == "bad chunks":
        return b"Transfer-Encoding: chunked\r\n", b"zz\r\n" + body
    length = {"right": len(body), "short": len(body) // 2, "long": len(body) + 9, "negative": -1}.get(kind)
    if kind == "words":
        return b"Content-Length: many\r\n", body
    return (b"" if length is None else b"Content-Length: %d\r\n" % length), body


@settings(max_examples=120, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(
    path=PATHS,
    headers=st.lists(st.tuples(NAMES, VALUES), max_size=4),
    body=BODIES,
    kind=LENGTHS,
    method=st.sampled_from([b"POST", b"POST", b"GET", b"BREW"]),
)
def test_requests_of_all_kinds(
    stand: Stand, path: str, headers: Sequence[tuple[str, bytes]], body: bytes, kind: str, method: bytes
) -> None:
    framing, wire = body_headers(kind, body)
    if method != b"POST" or not path.startswith(("/v1/c", "/t")):
        # aiohttp's own handler, which serves the other addresses, answers 500 where it is not UTF-8.
        headers = [(name, value) for name, value in headers if name != "Expect"]
    lines = b"".join(name.encode() + b": " + value + b"\r\n" for name, value in headers)
    head = method + b" " + path.encode() + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + framing + lines
    answer = exchange(stand, head + b"\r\n" + wire)
    assert not answer.startswith(b"HTTP/1.1 5"), answer[:500]


@settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=300))
def test_any_bytes(stand: Stand, sent: bytes) -> None:
    assert not exchange(stand, sent + b"\r\n\r\n").startswith(b"HTTP/1.1 5")


@pytest.fixture(autouse=True)
def _well_afterwards(stand: Stand, caplog: pytest.LogCaptureFixture) -> object:
    yield
    assert requests.get(stand.url + "/health", timeout=HUNG_S).status_code == 200
    answer = requests.post(stand.url + "/v1/completions", data=GOOD, timeout=HUNG_S)
    assert answer.status_code == 200
    errors = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert not [message for message in errors if "inside the coordinator" in message]
