"""A KV connector for vLLM that moves KV caches between any two layouts.

vLLM loads it by name:

    {"kv_connector": "HexgenConnector",
     "kv_connector_module_path": "hexgen2.vllm_plugin.kv_connector.connector",
     "kv_role": "kv_both"}

One file, one subject. Pure: `shards` (who holds which layers and heads), `transfer_plan` (who reads what from
whom), `regions` (the addresses of it), `leases` (how long a prefill's blocks stay put), `params` (what travels
between the two legs), `wire` (the control messages). At work in each worker: `transport` (NIXL),
`control_server` (the prefill side), `peers` and `loader` (the decode side), `worker` (their thread). In the
scheduler's process: `scheduler_side`, `keeper`. `connector` is the face that vLLM sees. docs/kv-connector.md
tells the whole story.
"""

CONNECTOR_NAME = "HexgenConnector"
CONNECTOR_MODULE = "hexgen2.vllm_plugin.kv_connector.connector"

__all__ = ["CONNECTOR_MODULE", "CONNECTOR_NAME"]
