"""What watches in the background must go on watching."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)


@contextmanager
def going_on(watch: str) -> Iterator[None]:
    """Around one round of a watch: a mistake in it is logged, and the next round comes. Without that the task
    would end unseen, and what it watches over would never be looked at again."""
    try:
        yield
    except Exception:
        log.exception("a mistake in a round of the %s, which goes on", watch)
