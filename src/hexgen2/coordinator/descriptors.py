"""How many connections this process may hold."""

from __future__ import annotations

import resource
from contextlib import suppress

WANTED = 65_536
"""File descriptors. Each stream takes two, its client's connection and its engine's; shells allow 1,024."""


def raise_limit() -> None:
    """Allow as many descriptors as are wanted, or as the system allows this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = WANTED if hard == resource.RLIM_INFINITY else min(WANTED, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        with suppress(ValueError, OSError):  # some systems have a lower bound that they do not tell
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
