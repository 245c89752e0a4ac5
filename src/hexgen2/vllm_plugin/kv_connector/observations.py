"""What a worker's transfers took, counted as plain lists: vLLM sends them from process to process."""

from __future__ import annotations

from typing import Any

TRANSFERS, FAILED, EXPIRED = "transfers", "failed", "expired"

Observations = dict[str, Any]
"""transfers: [peer, seconds, seconds to post, bytes, descriptors] each; failed: a peer each; expired: a number.
"""


def no_observations() -> Observations:
    return {TRANSFERS: [], FAILED: [], EXPIRED: 0}


def is_empty(observed: Observations) -> bool:
    return not (observed[TRANSFERS] or observed[FAILED] or observed[EXPIRED])


def add(observed: Observations, more: Observations) -> None:
    """Add `more` to `observed`, in place."""
    observed[TRANSFERS].extend(more[TRANSFERS])
    observed[FAILED].extend(more[FAILED])
    observed[EXPIRED] += more[EXPIRED]
