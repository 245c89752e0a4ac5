"""Prompts of a given length in tokens, made of token ids."""

from __future__ import annotations

import numpy as np


def random_prompt(tokens: int, vocabulary: int, rng: np.random.Generator) -> list[int]:
    """``tokens`` random token ids, clear of the special ones at the vocabulary's start.

    Random ids make prompts of exact length that share no prefix, so that no engine answers from its cache.
    """
    first = min(256, vocabulary // 2)
    return [int(token) for token in rng.integers(first, vocabulary, size=tokens)]
