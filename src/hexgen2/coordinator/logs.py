"""Logs with request ids, as text or as JSON lines. Prompts and answers never reach a log."""

from __future__ import annotations

import contextvars
import json
import logging
import time
from typing import Any

# Set by the handler of a request: every record written below it carries the id.
current_request: contextvars.ContextVar[str] = contextvars.ContextVar("hexgen2_request_id", default="")


class WithRequestId(logging.Filter):
    """Gives each record the id of the request it was written for."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.request_id = current_request.get()
        return True


class JsonLines(logging.Formatter):
    """One JSON object a line: time (Unix seconds), level, logger, message, request_id and exception where
    there are.
    """

    def format(self, record: logging.LogRecord) -> str:
        shown: dict[str, Any] = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        request_id = getattr(record, "request_id", "")
        if request_id:
            shown["request_id"] = request_id
        if record.exc_info:
            shown["exception"] = self.formatException(record.exc_info)
        return json.dumps(shown)


class Text(logging.Formatter):
    """For people."""

    def __init__(self) -> None:
        super().__init__("%(asctime)sZ %(levelname)s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S")
        self.converter = time.gmtime

    def format(self, record: logging.LogRecord) -> str:
        id_ = getattr(record, "request_id", "")
        return super().format(record) + (f" [{id_}]" if id_ else "")


def configured() -> tuple[str, bool]:
    """The level and whether it is JSON: what `configure` was told, or what is usual without it."""
    root = logging.getLogger()
    as_json = any(isinstance(handler.formatter, JsonLines) for handler in root.handlers)
    return logging.getLevelName(root.getEffectiveLevel()).lower(), as_json


def configure(level: str, as_json: bool) -> None:
    """Send the process's logs to stderr."""
    handler = logging.StreamHandler()
    handler.addFilter(WithRequestId())
    handler.setFormatter(JsonLines() if as_json else Text())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
