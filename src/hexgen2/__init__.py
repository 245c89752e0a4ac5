"""HexGen-2: plan and run disaggregated LLM serving over unlike GPUs (arXiv 2502.07903)."""

__version__ = "0.1.0"
