"""Groups beyond vLLM's own executors and connectors: our layout server and our connector run them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hexgen2.deploy import EngineOptions, compile_plan, counted_ports
from hexgen2.deploy.ports import two_ports
from hexgen2.deploy.ranks import divide
from hexgen2.specs import InputError, Plan
from hexgen2.vllm_plugin.asymmetric.layout import Layout

from .builders import MODEL, cluster, compiled, flag, group, plan

H100 = "H100-80G-SXM"
SERVER = "hexgen2.vllm_plugin.asymmetric.server"
NODES = [{"name": name, "gpu": H100, "count": 4, "host": f"10.0.0.{i}"} for i, name in enumerate("ab", 1)]
Stages = list[tuple[list[str], int]]


def pair(prefill: Stages, decode: Stages) -> Plan:
    return plan(
        cluster(*NODES),
        [group("p0", "prefill", *prefill), group("d0", "decode", *decode)],
        ("p0", "d0", 1.0),
    )


def kv_config(process: Any) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(flag(process, "--kv-transfer-config") or "{}")
    return loaded


@pytest.mark.parametrize(
    ("prefill", "decode", "connector"),
    [
        ([(["a/0"], 8)], [(["b/0"], 8)], "NixlConnector"),
        ([(["a/0"], 3), (["a/1"], 5)], [(["b/0"], 8)], "NixlPushConnector"),
        ([(["a/0", "a/1"], 3), (["a/2"], 5)], [(["b/0"], 8)], "HexgenConnector"),
        ([(["a/0"], 8)], [(["b/0"], 3), (["b/1"], 5)], "HexgenConnector"),
        ([(["a/0", "a/1", "a/2"], 8)], [(["b/0", "b/1"], 8)], "HexgenConnector"),
        # Uniform TP, but two ranks on one node and four on the other.
        ([(["a/0", "a/1"], 3), (["b/0", "b/1"], 3), (["b/2", "b/3"], 2)], [(["a/2"], 8)], "NixlPushConnector"),
    ],
)
def test_the_connector_is_vllm_s_own_where_that_will_do(
    prefill: Stages, decode: Stages, connector: str
) -> None:
    deployment = compile_plan(
        pair(prefill, decode), MODEL, counted_ports(9000), EngineOptions(run_id="r", python="p")
    )
    assert {kv_config(process)["kv_connector"] for process in deployment.processes} == {connector}
    for process in deployment.processes:
        ours = connector == "HexgenConnector"
        assert (kv_config(process)["kv_role"] == "kv_both") == ours
        assert (kv_config(process).get("kv_connector_module_path") is not None) == ours
        assert ("VLLM_NIXL_SIDE_CHANNEL_PORT" in process.env) != ours
        assert not (ours and "kv" in process.ports)


def test_a_lopsided_group_on_one_node() -> None:
    deployment = compiled(
        pair([(["a/2", "a/0"], 5), (["a/3"], 3)], [(["a/1"], 8)]), EngineOptions(run_id="run", python="python")
    )
    (prefill,) = deployment.group("p0")
    assert prefill.argv[:3] == ("python", "-m", SERVER)
    layout = Layout.parse(flag(prefill, "--layout") or "", "--layout")
    assert [(stage.tp, stage.first_layer, stage.layers, stage.node) for stage in layout.stages] == [
        (2, 0, 5, 0),
        (1, 5, 3, 0),
    ]
    # Without devices of its own the layout's ranks take the visible devices in their order.
    assert layout.node_devices(0) == ()
    assert prefill.env["CUDA_VISIBLE_DEVICES"] == "2,0,3"
    for name in ("--tensor-parallel-size", "--pipeline-parallel-size", "--nnodes", "--master-port"):
        assert flag(prefill, name) is None
    assert "VLLM_PP_LAYER_PARTITION" not in prefill.env
    assert "VLLM_PP_LAYER_PARTITION" in prefill.unset
    assert deployment.notes[0].startswith("KV caches: HexgenConnector, since group p0 has 2 stages (TP 2 then")
    (decode,) = deployment.group("d0")
    assert decode.argv[2] == "vllm.entrypoints.openai.api_server"


def test_a_lopsided_group_over_nodes() -> None:
    """It comes back to the node that it began on, whose process has three of its four ranks."""
    deployment = compile_plan(
        pair([(["b/0", "b/1"], 4), (["a/0"], 2), (["b/2"], 2)], [(["a/1"], 8)]),
        MODEL,
        counted_ports(9000),
        EngineOptions(run_id="run", python="python"),
    )
    head, second = deployment.group("p0")
    assert (head.node, head.gpus, second.node, second.gpus) == ("b", ("b/0", "b/1", "b/2"), "a", ("a/0",))
    layout = Layout.parse(flag(head, "--layout") or "", "--layout")
    assert [stage.node for stage in layout.stages] == [0, 1, 0]
    assert flag(second, "--layout") == flag(head, "--layout")
    assert second.argv[2] == SERVER
    assert head.ports["lifeline"] == head.ports["master"] + 1
    for process in (head, second):
        assert flag(process, "--node-rank") == str(process.rank)
        assert flag(process, "--master-addr") == "10.0.0.2"
        assert flag(process, "--master-port") == str(head.ports["master"])
        assert flag(process, "--nnodes") is None
    assert flag(second, "--port") is None
    assert flag(head, "--kv-transfer-config") == flag(second, "--kv-transfer-config")
    assert head.env["CUDA_VISIBLE_DEVICES"] == "0,1,2"


@pytest.mark.parametrize("connector", ["pull", "push"])
def test_vllm_s_own_connectors_cannot_be_forced_on_it(connector: Any) -> None:
    lopsided = pair([(["a/0", "a/1"], 5), (["a/2"], 3)], [(["b/0"], 8)])
    with pytest.raises(InputError, match=r"group p0.*one tensor-parallel size.*'hexgen'"):
        compiled(lopsided, EngineOptions(connector=connector))


def test_our_connector_can_be_asked_for() -> None:
    plain = pair([(["a/0"], 8)], [(["a/1"], 8)])
    deployment = compiled(plain, EngineOptions(connector="hexgen", run_id=None))
    configs = [kv_config(process) for process in deployment.processes]
    assert {config["kv_connector"] for config in configs} == {"HexgenConnector"}
    assert deployment.notes == ("KV caches: HexgenConnector, since it was asked for",)


def test_a_stage_that_no_engine_can_run() -> None:
    uneven = pair([(["a/0", "a/1", "a/2", "b/0"], 5), (["b/1"], 3)], [(["b/2"], 8)])
    with pytest.raises(InputError, match=r"group p0.*TP 4 lies unevenly over nodes \(3 on a, 1 on b\)"):
        divide(uneven.groups[0], "plan")


def test_two_ports_in_a_row() -> None:
    given = iter([5, 9, 10, 11])
    assert two_ports(lambda _host: next(given), "h") == (9, 10)
