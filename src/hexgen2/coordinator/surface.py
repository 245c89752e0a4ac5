"""What every address of the service shares: keys, bodies within bounds, errors as OpenAI bodies."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable

from aiohttp import web

from hexgen2.coordinator import errors, live
from hexgen2.coordinator.auth import ApiKeys
from hexgen2.coordinator.config import CoordinatorConfig
from hexgen2.coordinator.errors import ApiError
from hexgen2.coordinator.heads import KEEPALIVE_S, Heads
from hexgen2.coordinator.request import REQUEST_ID

log = logging.getLogger(__name__)

GENERATION = ("/v1/completions", "/v1/chat/completions")
_GUARDED = ("/v1/", "/tokenize", "/detokenize", live.STATE)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Surface:
    """The middlewares, and how a body is read."""

    def __init__(self, config: CoordinatorConfig, keys: ApiKeys | None) -> None:
        self._limits = config.limits
        self._timeouts = config.timeouts
        self.keys = keys
        self.heads = Heads(config.timeouts.headers_s)

    def application(self) -> web.Application:
        """Without any address."""
        return web.Application(
            client_max_size=self._limits.max_body_bytes, middlewares=[self._errors, self._guard]
        )

    @staticmethod
    def runner(app: web.Application) -> web.AppRunner:
        """What serves an application of this surface. A client that goes away cancels its request."""
        return web.AppRunner(
            app,
            handler_cancellation=True,
            access_log=None,
            shutdown_timeout=1.0,
            keepalive_timeout=KEEPALIVE_S,
        )

    @web.middleware
    async def _errors(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Whatever goes wrong before the answer begins becomes an OpenAI error body."""
        self.heads.came(request.protocol)
        try:
            return await handler(request)
        except ApiError as error:
            return error_response(error)
        except web.HTTPRequestEntityTooLarge:
            return error_response(errors.too_large(self._limits.max_body_bytes))
        except web.HTTPNotFound:
            return error_response(errors.not_found(request.method, request.path))
        except web.HTTPMethodNotAllowed as refused:
            allowed = ", ".join(sorted(refused.allowed_methods))
            return error_response(
                ApiError(405, f"Not allowed to {request.method} on {request.path}; use {allowed}.")
            )
        except web.HTTPException as refused:
            return error_response(ApiError(refused.status, refused.reason))
        except (ConnectionError, asyncio.CancelledError):
            raise
        except Exception:
            log.exception("request failed inside the coordinator")
            return error_response(errors.internal())

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if self.keys is not None and request.path.startswith(_GUARDED) and self.key(request) is None:
            raise errors.unauthorised()
        return await handler(request)

    def key(self, request: web.Request) -> str | None:
        """The client's key by name; None without one that is known."""
        return self.keys.who(request.headers.get("Authorization")) if self.keys is not None else None

    async def body(self, http: web.Request) -> bytes:
        """The whole request body, received within its time."""
        limit_s = self._timeouts.body_s
        try:
            async with asyncio.timeout(limit_s):
                return await http.read()
        except TimeoutError:
            raise errors.body_too_slow(limit_s) from None


async def expect(request: web.Request) -> web.Response | None:
    """`Expect: 100-continue` (curl sends it with large bodies) is answered; nothing else can be expected.

    aiohttp's own handler repeats the header, and fails where that is not UTF-8.
    """
    if request.headers.get("Expect", "").lower() != "100-continue":
        return error_response(ApiError(417, "Only 100-continue may be expected."))
    await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    request.writer.output_size = 0  # the answer has not begun yet
    return None


def error_response(error: ApiError) -> web.Response:
    headers = {"Content-Type": "application/json"}
    if error.request_id is not None:
        headers[REQUEST_ID] = error.request_id
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, round(error.retry_after_s)))
    return web.Response(status=error.status, body=json.dumps(error.body()).encode(), headers=headers)
