"""Load on an OpenAI-compatible endpoint, and what a client measures of it. Knows nothing of plans."""

from hexgen2.loadgen.client import Load, measure

__all__ = ["Load", "measure"]
