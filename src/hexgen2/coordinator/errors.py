"""What goes wrong, and the OpenAI error bodies that clients see for it."""

from __future__ import annotations

import json
from typing import Any, Literal

FailureKind = Literal[
    "connect",  # the engine could not be reached
    "lost",  # the connection broke before the answer was whole
    "timeout",  # silence for longer than the configured bound
    "down",  # health checks declared the engine down while it worked on the request
    "http_5xx",  # the engine answered with a server error
    "error_event",  # an SSE error event
    "finish_error",  # HTTP 200 with finish_reason "error"
    "bad_answer",  # an answer that does not follow the protocol
]


class ApiError(Exception):
    """Ends a request with an HTTP status and an OpenAI error body."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s
        self.request_id: str | None = None  # shown to the client where known

    def body(self) -> dict[str, Any]:
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}

    def event(self) -> bytes:
        """The same as an SSE event, for a stream that has begun."""
        return b"data: " + json.dumps(self.body()).encode() + b"\n\n"


class EngineFailure(Exception):
    """An engine failed a request; another may still serve it."""

    def __init__(self, kind: FailureKind, group_id: str, detail: str) -> None:
        super().__init__(f"{group_id}: {detail}")
        self.kind: FailureKind = kind
        self.group_id = group_id
        self.detail = detail

    def as_api_error(self) -> ApiError:
        """What the client sees once no further attempt is made."""
        status = 504 if self.kind == "timeout" else 502
        message = f"The serving engine {self.group_id} failed: {self.detail}. The request may be sent again."
        return ApiError(status, message, kind="server_error", code=f"engine_{self.kind}")


def out_of_service(group_id: str) -> EngineFailure:
    """The engine is not part of the plan any more."""
    return EngineFailure("down", group_id, "it was taken out of service")


class WorkersFailed(Exception):
    """A worker process ended while it started, or did not come up in time; it has told why on stderr."""


class ClientGone(Exception):
    """The client's connection broke while it was being written to. Not the engine's fault: never retried."""


def unknown_model(name: object) -> ApiError:
    message = f"The model `{name}` does not exist or you do not have access to it."
    return ApiError(404, message, code="model_not_found")


def bad_json(detail: str) -> ApiError:
    return ApiError(400, f"We could not parse the JSON body of your request: {detail}")


def not_found(method: str, path: str) -> ApiError:
    return ApiError(404, f"Unknown request URL: {method} {path}.", code="unknown_url")


def no_path() -> ApiError:
    message = "No complete path of serving engines is up at the moment. Try again shortly."
    return ApiError(503, message, kind="server_error", code="no_engine_available", retry_after_s=1.0)


def shutting_down() -> ApiError:
    message = "The server is shutting down and takes no new requests."
    return ApiError(503, message, kind="server_error", code="shutting_down", retry_after_s=5.0)


def too_large(limit_bytes: int) -> ApiError:
    return ApiError(413, f"The request body is larger than {limit_bytes} bytes.", code="request_too_large")


def unauthorised() -> ApiError:
    message = "Incorrect or missing API key. Send it as `Authorization: Bearer KEY`."
    return ApiError(401, message, code="invalid_api_key")


def bodies_full() -> ApiError:
    message = "The service holds as many request bodies as it has memory for. Try again shortly."
    return ApiError(503, message, kind="server_error", code="overloaded", retry_after_s=1.0)


def body_too_slow(limit_s: float) -> ApiError:
    return ApiError(408, f"The request body was not received within {limit_s:g} s.", code="body_timeout")


def internal() -> ApiError:
    return ApiError(500, "Internal error of the coordinator.", kind="server_error", code="internal_error")


def took_too_long(limit_s: float) -> ApiError:
    message = f"The request was not finished within {limit_s:g} s."
    return ApiError(504, message, kind="server_error", code="request_timeout")
