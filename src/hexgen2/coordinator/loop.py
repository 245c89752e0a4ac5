"""The event loop that serves: uvloop where there is one, elsewhere asyncio's own, the same but slower."""

from __future__ import annotations

try:
    from uvloop import run
except ImportError:
    from asyncio import run

__all__ = ["run"]
