"""Run a vLLM engine whose pipeline stages differ in tensor parallelism, in layers and in node.

The server starts with `python -m hexgen2.vllm_plugin.asymmetric.server --layout 2x5+1x3 MODEL ...`;
docs/runtime.md says how it works and what is supported. This face holds what other code may use: the layout
of an engine, and a worker's position in it.
"""

from hexgen2.vllm_plugin.asymmetric.layout import LAYOUT_KEY, Layout, Place, StageLayout
from hexgen2.vllm_plugin.asymmetric.position import Position, layout_of, worker_position

__all__ = ["LAYOUT_KEY", "Layout", "Place", "Position", "StageLayout", "layout_of", "worker_position"]
