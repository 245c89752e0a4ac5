"""The garbage collector while planning."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def seldom_collected() -> Iterator[None]:
    """Let the garbage collector look seldom, and not at what is there already.

    A search makes millions of small tuples, which it keeps in its caches, and hardly a cycle: looking through
    them again and again takes a tenth of the time of a plan for 64 GPUs. Memory grows by what cycles hold until
    the next look.
    """
    thresholds = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(100_000, 50, 50)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()
