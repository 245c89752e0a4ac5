"""The service's OpenAPI description, served at /openapi.json. Pure.

Bodies are described as far as the coordinator reads them: whatever else vLLM knows passes through, so unknown
fields are allowed, and an engine's refusal (4xx) is an answer like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Schema = dict[str, Any]

_ERROR: Schema = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "integer", "null"]},
            },
        }
    },
}
# One server-sent event; its data is a chunk as JSON, or [DONE].
_EVENT: Schema = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}}
_USAGE: Schema = {
    "type": "object",
    "required": ["prompt_tokens", "total_tokens"],
    "properties": {
        "prompt_tokens": {"type": "integer"},
        "completion_tokens": {"type": ["integer", "null"]},
        "total_tokens": {"type": "integer"},
    },
}
_TEXT_OR_IDS: Schema = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
        {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1, "maxItems": 8},
    ]
}
_MESSAGES: Schema = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "required": ["role", "content"],
        "properties": {
            "role": {"enum": ["system", "user", "assistant"]},
            "content": {"type": "string"},
        },
    },
}
_COMMON: Schema = {
    "max_tokens": {"type": ["integer", "null"], "minimum": 1},
    "stream": {"type": ["boolean", "null"]},
    "temperature": {"type": ["number", "null"], "minimum": 0, "maximum": 2},
    "stop": {
        "anyOf": [
            {"type": ["string", "null"]},
            {"type": "array", "items": {"type": "string"}, "maxItems": 4},
        ]
    },
    "priority": {"type": "integer", "description": "lower goes first"},
}
# What each status means beside an answer; errors are OpenAI error bodies.
_STATUSES = {
    400: "The request is not understood, by the coordinator or by the engine",
    401: "No API key, or none that is known",
    404: "The model is not served",
    408: "The body did not come in time",
    413: "The body is too large",
    422: "The engine refuses the body",
    429: "At capacity: Retry-After says when to try again",
    502: "Engines failed the request as often as it may be tried",
    503: "No path of engines is up, or the service shuts down: Retry-After says when to try again",
    504: "An engine, or the request as a whole, took too long",
}


def document(model_names: Sequence[str], version: str, guarded: bool) -> Schema:
    """The whole description; `guarded`: requests under /v1 need an API key."""
    model: Schema = {"enum": list(model_names), "description": "the served model where not given"}
    completion = _object({"model": model, "prompt": _TEXT_OR_IDS, **_COMMON}, "prompt")
    chat = _object({"model": model, "messages": _MESSAGES, **_COMMON}, "messages")
    tokenize = _object({"model": model, "prompt": {"type": "string"}}, "prompt")
    detokenize = _object(
        {"model": model, "tokens": {"type": "array", "items": {"type": "integer", "minimum": 0}}}, "tokens"
    )
    name = {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    paths: Schema = {
        "/v1/completions": {"post": _generation("Complete a prompt", completion, "text_completion")},
        "/v1/chat/completions": {"post": _generation("Answer a conversation", chat, "chat.completion")},
        "/tokenize": {"post": _post("Text as token ids", tokenize, _json(_any_object("tokens")))},
        "/detokenize": {"post": _post("Token ids as text", detokenize, _json(_any_object("prompt")))},
        "/v1/models": {"get": _get("The served models", {200: _json(_any_object("data"))}, (401,))},
        "/v1/models/{model}": {
            "get": _get("One served model", {200: _json(_any_object("id"))}, (401, 404))
            | {"parameters": [name]}
        },
        "/health": {
            "get": _get(
                "Whether requests can be served, and the engines' states",
                {200: _json(_any_object("status")), 503: _json(_any_object("status"))},
            )
        },
        "/metrics": {"get": _get("Prometheus metrics", {200: {"text/plain": {"schema": {"type": "string"}}}})},
        "/live/state": {
            "get": _get(
                "What the service did in the last minutes: the live page's data",
                {200: _json(_any_object("now", "groups", "routes", "events"))},
                (400, 401),
            )
            | {
                "parameters": [
                    _query("after", "add the history since this `seq`", {"type": "integer", "minimum": 0}),
                    _query("pictures", "1: add the plan as SVG", {"enum": ["0", "1"]}),
                ]
            }
        },
        "/version": {"get": _get("The version", {200: _json(_any_object("version"))})},
    }
    for path in paths.values():
        for operation in path.values():
            for status, response in operation["responses"].items():
                if status != "200" and "content" not in response:
                    response["content"] = error
    found: Schema = {
        "openapi": "3.1.0",
        "info": {"title": "HexGen-2 coordinator", "version": version},
        "paths": paths,
        "components": {"schemas": {"Error": _ERROR, "Usage": _USAGE}},
    }
    if guarded:
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{"key": []}]
    return found


def _object(properties: Schema, *required: str) -> Schema:
    return {"type": "object", "properties": properties, "required": list(required)}


def _any_object(*required: str) -> Schema:
    return {"type": "object", "required": list(required)}


def _json(schema: Schema) -> Schema:
    return {"application/json": {"schema": schema}}


def _get(summary: str, contents: dict[int, Schema], errors: Sequence[int] = ()) -> Schema:
    responses = {
        str(status): {"description": summary, "content": content} for status, content in contents.items()
    }
    return {"summary": summary, "responses": responses | _errors(errors)}


def _query(name: str, description: str, schema: Schema) -> Schema:
    return {"name": name, "in": "query", "required": False, "description": description, "schema": schema}


def _errors(statuses: Sequence[int]) -> Schema:
    return {str(status): {"description": _STATUSES[status]} for status in statuses}


def _post(summary: str, body: Schema, answer: Schema) -> Schema:
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": _json(body)},
        "responses": {"200": {"description": "The answer", "content": answer}} | _errors(tuple(_STATUSES)),
    }


def _generation(summary: str, body: Schema, kind: str) -> Schema:
    whole = _object(
        {
            "id": {"type": "string"},
            "object": {"const": kind},
            "choices": {"type": "array", "minItems": 1},
            "usage": {"$ref": "#/components/schemas/Usage"},
        },
        *("id", "object", "created", "model", "choices", "usage"),
    )
    return _post(summary, body, _json(whole) | {"text/event-stream": {"schema": _EVENT}})
