"""A client's request, read and checked as far as the coordinator must: everything else is the engine's
business.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from hexgen2.coordinator import legs
from hexgen2.coordinator.errors import ApiError, bad_json, unknown_model

REQUEST_ID = "X-Request-Id"

# Connection-level headers, what the HTTP client sets itself, and what is meant for the coordinator only.
_NOT_FORWARDED = frozenset(
    {
        "accept-encoding",
        "authorization",
        "connection",
        "content-encoding",
        "content-length",
        "content-type",
        "cookie",
        "expect",
        "host",
        "keep-alive",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "x-hexgen2-report",
        "x-request-id",
    }
)
_GOOD_ID = re.compile(r"[\x21-\x7e]{1,200}")


@dataclass(frozen=True)
class ClientRequest:
    """One generation request. `raw` is the body as it came; it goes on unchanged wherever nothing has to be
    added.
    """

    endpoint: str
    body: dict[str, Any]
    raw: bytes
    headers: Mapping[str, str]
    id: str
    stream: bool
    obstacle: str | None
    arrived: float = field(default_factory=time.perf_counter)

    @property
    def priority(self) -> int:
        """vLLM's: lower goes first."""
        given = self.body.get("priority")
        return given if isinstance(given, int) and not isinstance(given, bool) else 0

    @property
    def chat(self) -> bool:
        return self.endpoint.endswith("/chat/completions")


def request_id(headers: Mapping[str, str]) -> str:
    """The client's id where it is fit for a header, else a new one."""
    given = headers.get(REQUEST_ID, "")
    return given if _GOOD_ID.fullmatch(given) else uuid.uuid4().hex


def parse_request(
    endpoint: str, raw: bytes, headers: Mapping[str, str], id_: str, model_names: Collection[str]
) -> ClientRequest:
    """Read a body; ApiError where it is no JSON object or names a model that is not served."""
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise bad_json(str(error)) from None
    if not isinstance(body, dict):
        raise bad_json("it must be a JSON object")
    model = body.get("model")
    if model is not None and (not isinstance(model, str) or model not in model_names):
        raise unknown_model(model)
    if not isinstance(body.get("stream"), bool | None):
        raise ApiError(400, "`stream` must be true or false.", param="stream")
    body, stripped = legs.strip_reserved(body)
    forwarded = {name: value for name, value in headers.items() if name.lower() not in _NOT_FORWARDED}
    forwarded |= {REQUEST_ID: id_, "Content-Type": "application/json", "Accept-Encoding": "identity"}
    return ClientRequest(
        endpoint=endpoint,
        body=body,
        raw=encode(body) if stripped else raw,
        headers=forwarded,
        id=id_,
        stream=bool(body.get("stream")),
        obstacle=legs.handoff_obstacle(body),
    )


def encode(body: Mapping[str, Any] | list[Any]) -> bytes:
    return json.dumps(body, separators=(",", ":")).encode()
