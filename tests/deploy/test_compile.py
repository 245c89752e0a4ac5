"""A plan becomes the right vLLM processes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hexgen2.coordinator import Limits
from hexgen2.deploy import Address, Deployment, EngineOptions, compile_plan, counted_ports
from hexgen2.specs import InputError, Plan, Stage

from .builders import MODEL, cluster, compiled, flag, group, numbered, plan

H100 = "H100-80G-SXM"
A100 = "A100-80G-SXM"


def pair_plan(**prefill: Any) -> Plan:
    """One prefill and one decode group of a GPU each, on one node."""
    return plan(
        cluster(("a", H100, 2)),
        [
            group("p0", "prefill", (["a/0"], 8), **prefill),
            group("d0", "decode", (["a/1"], 8)),
        ],
        ("p0", "d0", 1.0),
    )


def kv_config(deployment: Deployment, group_id: str) -> dict[str, Any]:
    text = flag(deployment.group(group_id)[0], "--kv-transfer-config")
    assert text
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def test_a_pair_on_one_node() -> None:
    deployment = compiled(pair_plan(max_batch=48))
    prefill, decode = deployment.processes
    assert prefill.argv[:3] == ("python", "-m", "vllm.entrypoints.openai.api_server")
    assert flag(prefill, "--model") == "/models/toy"
    assert flag(prefill, "--served-model-name") == "toy"
    assert flag(prefill, "--max-num-seqs") == "48"
    assert flag(prefill, "--gpu-memory-utilization") == "0.9"
    assert flag(prefill, "--max-model-len") == "auto"
    assert flag(prefill, "--host") == "127.0.0.1"
    assert flag(prefill, "--port") == str(prefill.ports["http"])
    assert prefill.readiness_url == f"http://127.0.0.1:{prefill.ports['http']}/health"
    assert (prefill.env["CUDA_VISIBLE_DEVICES"], decode.env["CUDA_VISIBLE_DEVICES"]) == ("0", "1")
    assert prefill.env["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert prefill.env["VLLM_NIXL_SIDE_CHANNEL_HOST"] == "127.0.0.1"
    assert prefill.env["VLLM_NIXL_SIDE_CHANNEL_PORT"] == str(prefill.ports["kv"])
    assert prefill.env["HEXGEN2_VLLM_TUNING"] == "parent-death,ucx-settings"
    assert kv_config(deployment, "p0") == {
        "kv_connector": "NixlConnector",
        "kv_role": "kv_producer",
        "engine_id": "p0-run",
        "kv_load_failure_policy": "fail",
    }
    assert kv_config(deployment, "d0")["kv_role"] == "kv_consumer"


def test_the_coordinator_learns_engines_and_routes() -> None:
    deployment = compiled(
        plan(
            cluster(("a", H100, 4)),
            [
                group("p0", "prefill", (["a/0"], 8), share=0.75),
                group("d0", "decode", (["a/1"], 8), share=0.5),
                group("d1", "decode", (["a/2"], 8), share=0.25),
                group("c0", "colocated", (["a/3"], 8), share=0.25, max_batch=5),
            ],
            ("p0", "d0", 0.5),
            ("p0", "d1", 0.25),
        )
    )
    config = deployment.coordinator
    assert config.served_model_names == ("toy",)
    assert {route.decode: route.share for route in config.routes} == {"d0": 0.5, "d1": 0.25}
    assert config.engine("c0").max_batch == 5
    for engine in config.engines:
        head = deployment.group(engine.group_id)[0]
        assert engine.url == f"http://127.0.0.1:{head.ports['http']}"
        assert (engine.role, head.role) == (head.role, engine.role)
    # A colocated engine hands no cache on.
    assert flag(deployment.group("c0")[0], "--kv-transfer-config") is None
    assert "kv" not in deployment.group("c0")[0].ports


@pytest.mark.parametrize(
    ("prefill_stages", "mode", "partition"),
    [
        ([(["a/0"], 8)], "pull", None),
        ([(["a/0", "a/1"], 8)], "pull", None),
        ([(["a/0"], 3), (["a/1"], 5)], "push", "3,5"),
        ([(["a/0", "a/1"], 2), (["a/2", "a/3"], 6)], "push", "2,6"),
    ],
)
def test_layouts_and_connectors(prefill_stages: Any, mode: str, partition: str | None) -> None:
    deployment = compiled(
        plan(
            cluster(("a", H100, 6)),
            [
                group("p0", "prefill", *prefill_stages),
                group("d0", "decode", (["a/4", "a/5"], 8)),
            ],
            ("p0", "d0", 1.0),
        )
    )
    prefill = deployment.group("p0")[0]
    assert flag(prefill, "--tensor-parallel-size") == str(len(prefill_stages[0][0]))
    assert flag(prefill, "--pipeline-parallel-size") == str(len(prefill_stages))
    assert prefill.env.get("VLLM_PP_LAYER_PARTITION") == partition
    # One connector for the whole plan: the two kinds cannot talk to each other.
    connector = {"pull": "NixlConnector", "push": "NixlPushConnector"}[mode]
    assert [kv_config(deployment, name)["kv_connector"] for name in ("p0", "d0")] == [connector, connector]
    assert deployment.notes[0].startswith(f"KV caches: NIXL {mode}, since")


def test_one_pipelined_prefill_group_makes_the_whole_plan_push() -> None:
    deployment = compiled(
        plan(
            cluster(("a", H100, 4)),
            [
                group("p0", "prefill", (["a/0"], 8), share=0.5),
                group("p1", "prefill", (["a/1"], 3), (["a/2"], 5), share=0.5),
                group("d0", "decode", (["a/3"], 8)),
            ],
            ("p0", "d0", 0.5),
            ("p1", "d0", 0.5),
        )
    )
    used = {kv_config(deployment, name)["kv_connector"] for name in ("p0", "p1", "d0")}
    assert used == {"NixlPushConnector"}
    assert "p1" in deployment.notes[0]


@pytest.mark.parametrize(
    ("devices", "pinned"),
    [
        ((H100, A100), {"--dtype": "bfloat16", "--attention-backend": "FLASH_ATTN", "--block-size": "16"}),
        ((H100, "V100-32G-SXM"), {"--dtype": "half", "--attention-backend": "TRITON_ATTN"}),
        ((A100, "T4"), {"--dtype": "half", "--attention-backend": "TRITON_ATTN"}),
        (("MI300X", "MI300X"), {"--dtype": "bfloat16", "--attention-backend": "TRITON_ATTN"}),
        (("cpu-1c", "cpu-2c-4g"), {"--dtype": "float32", "--attention-backend": "CPU_ATTN"}),
    ],
)
def test_numerics_are_pinned_alike(devices: tuple[str, str], pinned: dict[str, str]) -> None:
    nodes = [{"name": f"n{i}", "gpu": kind, "count": 1, "host": "127.0.0.1"} for i, kind in enumerate(devices)]
    deployment = compiled(
        plan(
            cluster(*nodes),
            [group("p0", "prefill", (["n0/0"], 8)), group("d0", "decode", (["n1/0"], 8))],
            ("p0", "d0", 1.0),
        )
    )
    for process in deployment.processes:
        assert flag(process, "--kv-cache-dtype") == "auto"
        for name, value in pinned.items():
            assert flag(process, name) == value


def test_options_override_what_is_derived() -> None:
    options = EngineOptions(
        python="py",
        run_id="r",
        dtype="float16",
        kv_cache_dtype="fp8",
        attention_backend="FLASHINFER",
        block_size=64,
        max_model_len=4096,
        memory_utilisation=0.8,
        connector="push",
        load_failure_policy="recompute",
        extra_arguments=("--seed", "7"),
    )
    process = compiled(pair_plan(), options).processes[0]
    expected = {
        "--dtype": "float16",
        "--kv-cache-dtype": "fp8",
        "--attention-backend": "FLASHINFER",
        "--block-size": "64",
        "--max-model-len": "4096",
        "--gpu-memory-utilization": "0.8",
        "--seed": "7",
    }
    assert {name: flag(process, name) for name in expected} == expected
    config = kv_config(compiled(pair_plan(), options), "p0")
    assert (config["kv_connector"], config["kv_load_failure_policy"]) == ("NixlPushConnector", "recompute")


def test_mla_and_fp8_caches() -> None:
    mla = MODEL.model_copy(update={"mla": {"kv_lora_rank": 1}, "kv_bytes": 1.0})
    process = compiled(pair_plan(), model=mla).processes[0]
    assert flag(process, "--attention-backend") == "TRITON_MLA"
    assert flag(process, "--kv-cache-dtype") == "fp8"


def test_latent_attention_is_not_disaggregated_on_cpu() -> None:
    """vLLM's kernel there answers with other tokens, and says nothing."""
    devices = cluster(("a", "cpu-1c", 2))
    mla = MODEL.model_copy(update={"mla": {"kv_lora_rank": 1}})
    apart = [group("p0", "prefill", (["a/0"], 8)), group("d0", "decode", (["a/1"], 8))]
    with pytest.raises(InputError, match="latent attention on CPU"):
        compiled(plan(devices, apart, ("p0", "d0", 1.0)), model=mla)


def test_cpu_engines_get_their_settings() -> None:
    deployment = compiled(
        plan(
            cluster(("a", "cpu-1c", 2), ("b", "cpu-1c", 1)),
            [
                group("p0", "prefill", (["a/0", "a/1"], 8)),
                group("d0", "decode", (["b/0"], 8)),
            ],
            ("p0", "d0", 1.0),
        )
    )
    wide, single = deployment.processes
    for process in (wide, single):
        assert process.env["HEXGEN2_VLLM_TUNING"] == "cpu"
        assert process.env["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
        assert process.env["OMP_NUM_THREADS"] == "1"
        assert process.env["VLLM_HOST_IP"] == "127.0.0.1"
        assert "CUDA_VISIBLE_DEVICES" not in process.env
        assert {"VLLM_CPU_KVCACHE_SPACE", "VLLM_API_KEY"} <= set(process.unset)
        assert flag(process, "--enforce-eager") == ""
        assert flag(process, "--gpu-memory-utilization") is None
    assert flag(wide, "--distributed-executor-backend") is None
    assert (flag(single, "--distributed-executor-backend") or "").endswith("UniProcExecutor")


def test_a_group_that_spans_nodes() -> None:
    nodes = [
        {"name": "a", "gpu": H100, "count": 2, "host": "10.0.0.1"},
        {"name": "b", "gpu": A100, "count": 2, "host": "10.0.0.2"},
        {"name": "c", "gpu": A100, "count": 1, "host": "10.0.0.3"},
    ]
    deployment = compile_plan(
        plan(
            cluster(*nodes),
            [
                group("p0", "prefill", (["b/0", "b/1"], 3), (["a/0", "a/1"], 5)),
                group("d0", "decode", (["c/0"], 8)),
            ],
            ("p0", "d0", 1.0),
        ),
        MODEL,
        counted_ports(9000),
        EngineOptions(run_id="run", python="python"),
    )
    head, second = deployment.group("p0")
    # Rank order is stage order: the first stage is on b.
    assert (head.node, second.node) == ("b", "a")
    assert (head.rank, second.rank) == (0, 1)
    for process in (head, second):
        assert flag(process, "--nnodes") == "2"
        assert flag(process, "--node-rank") == str(process.rank)
        assert flag(process, "--master-addr") == "10.0.0.2"
        assert flag(process, "--master-port") == str(head.ports["master"])
        assert process.env["VLLM_PP_LAYER_PARTITION"] == "3,5"
        assert process.env["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert (head.env["VLLM_HOST_IP"], second.env["VLLM_HOST_IP"]) == ("10.0.0.2", "10.0.0.1")
    assert head.readiness_url == "http://10.0.0.2:9000/health"
    assert second.readiness_url is None
    assert flag(second, "--headless") == ""
    assert second.argv[2] == "hexgen2.vllm_plugin.headless"
    assert flag(second, "--port") is None
    assert second.ports == {}
    assert flag(deployment.group("d0")[0], "--host") == "10.0.0.3"
    # Both processes are one engine to NIXL.
    assert flag(head, "--kv-transfer-config") == flag(second, "--kv-transfer-config")


def test_engines_that_others_may_restart_draw_their_own_identity() -> None:
    """But the processes of one group must share one."""
    nodes = [{"name": name, "gpu": H100, "count": 1, "host": f"10.0.0.{i}"} for i, name in enumerate("abc", 1)]
    deployment = compiled(
        plan(
            cluster(*nodes),
            [group("p0", "prefill", (["a/0"], 3), (["b/0"], 5)), group("d0", "decode", (["c/0"], 8))],
            ("p0", "d0", 1.0),
        ),
        EngineOptions(run_id=None, python="python"),
    )
    assert "engine_id" not in kv_config(deployment, "d0")
    assert kv_config(deployment, "p0")["engine_id"] == "p0"
    assert len({flag(process, "--kv-transfer-config") for process in deployment.group("p0")}) == 1


class Pods:
    """A site as a container platform has it: names outside, addresses and devices of its own inside."""

    def address(self, group: str, rank: int, node: str) -> Address:
        return Address(reach=f"svc-{group}-{rank}-{node}", listen="0.0.0.0", own="OWN")

    def devices(self, gpus: tuple[str, ...]) -> tuple[int, ...]:
        return tuple(range(len(gpus)))

    def node_rank(self, rank: int) -> str:
        return f"RANK{rank}"


def test_a_site_gives_addresses_devices_and_ranks() -> None:
    """Nodes need no host then: nothing asks for it."""
    deployment = compile_plan(
        plan(
            cluster(("a", H100, 3), ("b", H100, 2)),
            [
                group("p0", "prefill", (["a/0", "a/1"], 3), (["b/0", "b/1"], 5)),
                group("d0", "decode", (["a/2"], 8)),
            ],
            ("p0", "d0", 1.0),
        ),
        MODEL,
        counted_ports(8000),
        EngineOptions(run_id="run", python="python"),
        site=Pods(),
    )
    head, second = deployment.group("p0")
    (decode,) = deployment.group("d0")
    assert flag(head, "--host") == "0.0.0.0"
    assert (head.env["VLLM_HOST_IP"], second.env["VLLM_HOST_IP"]) == ("OWN", "OWN")
    assert {flag(process, "--master-addr") for process in (head, second)} == {"svc-p0-0-a"}
    assert [flag(process, "--node-rank") for process in (head, second)] == ["RANK0", "RANK1"]
    # A rank binds its own address and calls its head by name.
    assert head.env["VLLM_NIXL_SIDE_CHANNEL_HOST"] == "OWN"
    assert second.env["VLLM_NIXL_SIDE_CHANNEL_HOST"] == "svc-p0-0-a"
    assert decode.env["CUDA_VISIBLE_DEVICES"] == "0"
    assert deployment.coordinator.engine("d0").url == "http://svc-d0-0-a:8000"
    assert head.readiness_url == "http://svc-p0-0-a:8000/health"


def test_a_stage_each_where_nodes_hold_unequal_parts() -> None:
    """Two stages on one node and one on another: three processes, since vLLM wants equal parts."""
    nodes = [
        {"name": "a", "gpu": H100, "count": 2, "host": "10.0.0.1"},
        {"name": "b", "gpu": A100, "count": 1, "host": "10.0.0.2"},
    ]
    deployment = compiled(
        plan(
            cluster(*nodes),
            [group("c0", "colocated", (["a/0"], 3), (["a/1"], 3), (["b/0"], 2))],
        )
    )
    assert [process.gpus for process in deployment.processes] == [("a/0",), ("a/1",), ("b/0",)]
    assert [process.env["CUDA_VISIBLE_DEVICES"] for process in deployment.processes] == ["0", "1", "0"]
    assert [process.name for process in deployment.processes] == ["c0.0", "c0.1", "c0.2"]


def test_nodes_at_one_address_share_its_devices() -> None:
    nodes = [{"name": name, "gpu": H100, "count": 2, "host": "127.0.0.1"} for name in "ab"]
    deployment = compiled(
        plan(
            cluster(*nodes),
            [group("p0", "prefill", (["a/1"], 8)), group("d0", "decode", (["b/0"], 8))],
            ("p0", "d0", 1.0),
        )
    )
    assert [process.env["CUDA_VISIBLE_DEVICES"] for process in deployment.processes] == ["1", "2"]


def two_nodes(**second: Any) -> Plan:
    """A pair of groups on two H100 nodes of which the second may be described further."""
    nodes = [
        {"name": "a", "gpu": H100, "count": 1, "host": "10.0.0.1"},
        {"name": "b", "gpu": H100, "count": 1, **second},
    ]
    return plan(
        cluster(*nodes),
        [group("p0", "prefill", (["a/0"], 8)), group("d0", "decode", (["b/0"], 8))],
        ("p0", "d0", 1.0),
    )


def one_group(*stages: tuple[list[str], int], count: int = 8, gpu: str = H100) -> Plan:
    return plan(cluster(("a", gpu, count)), [group("c0", "colocated", *stages)])


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (two_nodes(), ("nodes[1].host", "'b'", "host: ADDRESS")),
        (two_nodes(host="127.0.0.1"), ("nodes[1].host", "'a'", "cannot reach")),
        (two_nodes(host="10.0.0.2", gpu="MI300X"), ("amd and nvidia",)),
        (one_group((["a/0"], 4)), ("group c0", "hold 4 layers", "has 8")),
        (
            plan(
                cluster(
                    {"name": "a", "gpu": H100, "count": 3, "host": "10.0.0.1"},
                    {"name": "b", "gpu": H100, "count": 1, "host": "10.0.0.2"},
                ),
                [group("c0", "colocated", (["a/0", "a/1", "a/2", "b/0"], 8))],
            ),
            ("group c0", "3 on a, 1 on b"),
        ),
    ],
)
def test_what_vllm_cannot_run_is_told_in_one_line(bad: Plan, words: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as caught:
        compiled(bad)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_pull_cannot_be_forced_on_a_pipelined_prefill_group() -> None:
    pipelined = plan(
        cluster(("a", H100, 3)),
        [group("p0", "prefill", (["a/0"], 4), (["a/1"], 4)), group("d0", "decode", (["a/2"], 8))],
        ("p0", "d0", 1.0),
    )
    with pytest.raises(InputError, match=r"p0.*push"):
        compiled(pipelined, EngineOptions(connector="pull"))


def test_a_model_without_weights_is_refused() -> None:
    with pytest.raises(InputError, match="model directory"):
        compiled(pair_plan(), model=MODEL.model_copy(update={"location": ""}))


@pytest.mark.parametrize(
    ("asked", "names"),
    [("toy", ("toy",)), ("/some/where/my-model", ("my-model", "toy")), ("other", ("other", "toy"))],
)
def test_served_names(asked: str, names: tuple[str, ...]) -> None:
    renamed = pair_plan().model_copy(update={"model": asked})
    assert compiled(renamed).coordinator.served_model_names == names


def test_engines_started_again_have_another_identity() -> None:
    first, second = (kv_config(compiled(pair_plan(), EngineOptions()), "p0") for _ in range(2))
    assert first["engine_id"] != second["engine_id"]


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Plans that vLLM can run: nodes of 1-4 GPUs, uniform TP inside nodes, PP only where it is allowed."""
    nodes = [
        {
            "name": f"n{i}",
            "gpu": H100,
            "count": draw(st.integers(1, 4)),
            "host": f"10.0.0.{draw(st.integers(1, 3))}",
        }
        for i in range(draw(st.integers(1, 4)))
    ]
    free = [[f"{node['name']}/{i}" for i in range(node["count"])] for node in nodes]
    groups = []
    for number in range(draw(st.integers(1, 4))):
        tp = draw(st.sampled_from([1, 2]))
        role = draw(st.sampled_from(["prefill", "decode", "colocated"]))
        stages = []
        for _ in range(1 if role == "decode" else draw(st.integers(1, 3))):
            roomy = [gpus for gpus in free if len(gpus) >= tp]
            if roomy:
                gpus = draw(st.sampled_from(roomy))
                stages.append([gpus.pop(0) for _ in range(tp)])
        if stages:
            layers = [1] * (len(stages) - 1)
            groups.append(group(f"g{number}", role, *zip(stages, [*layers, 8 - len(layers)], strict=True)))
    assume(groups)
    pairs = [(p.id, d.id) for p in groups if p.role == "prefill" for d in groups if d.role == "decode"]
    if not pairs:
        groups = [one.model_copy(update={"role": "colocated"}) for one in groups]
    colocated = {one.id for one in groups if one.role == "colocated"}
    share = 1 / (len(pairs) + len(colocated))
    groups = [one.model_copy(update={"share": share if one.id in colocated else 0.0}) for one in groups]
    return plan(cluster(*nodes), groups, *[(p, d, share) for p, d in pairs])


@settings(max_examples=150, deadline=None)
@given(plans())
def test_every_device_once_and_no_port_twice(some: Plan) -> None:
    deployment = compile_plan(some, MODEL, counted_ports(20_000), EngineOptions(run_id="r", python="p"))
    planned = [gpu for g in some.groups for gpu in g.gpus]
    assert sorted(gpu for process in deployment.processes for gpu in process.gpus) == sorted(planned)
    seen = [
        (process.host, device)
        for process in deployment.processes
        for device in process.env["CUDA_VISIBLE_DEVICES"].split(",")
    ]
    assert len(set(seen)) == len(seen) == len(planned)
    ports = [(process.host, port) for process in deployment.processes for port in process.ports.values()]
    assert len(set(ports)) == len(ports)
    names = [process.name for process in deployment.processes]
    assert len(set(names)) == len(names)
    for a_group in some.groups:
        members = deployment.group(a_group.id)
        # Rank order is stage order, each process has equally many ranks, exactly the first has a server.
        assert tuple(gpu for process in members for gpu in process.gpus) == a_group.gpus
        assert len({len(process.gpus) for process in members}) == 1
        assert [process.readiness_url is not None for process in members] == [True] + [False] * (
            len(members) - 1
        )
        layers = [stage.layers for stage in a_group.stages]
        if len(layers) > 1:
            assert all(
                process.env["VLLM_PP_LAYER_PARTITION"] == ",".join(map(str, layers)) for process in members
            )
    assert Deployment.model_validate_json(deployment.model_dump_json()) == deployment


def test_compiling_twice_gives_the_same() -> None:
    options = EngineOptions(run_id="r", python="p")
    first, second = (compile_plan(pair_plan(), MODEL, numbered(), options) for _ in range(2))
    assert first == second


def test_stage_tp_is_what_vllm_gets() -> None:
    """The plan's own check: a stage's TP is its number of GPUs, which the visible devices then hold."""
    with pytest.raises(ValueError, match="make them equal"):
        Stage(gpus=("a/0",), tp=2, first_layer=0, layers=8)


@pytest.mark.parametrize(("target", "wait_s"), [(None, Limits().queue_wait_s), (0.4, 0.4)])
def test_nobody_waits_longer_than_the_target_for_the_first_token(target: float | None, wait_s: float) -> None:
    one = cluster(("a", "H100-80G-SXM", 1))
    served = plan(one, [group("c0", "colocated", (["a/0"], 8))], slo={"ttft_s": target})
    assert compiled(served).coordinator.limits.queue_wait_s == wait_s


@pytest.mark.parametrize(
    ("asked", "option", "given"), [(None, 8192, 8192), (1200, 8192, 1200), (1200, 600, 600)]
)
def test_a_group_short_of_memory_gets_its_own_token_budget(asked: int | None, option: int, given: int) -> None:
    one = pair_plan()
    first = one.groups[0].model_copy(update={"token_budget": asked})
    short = one.model_copy(update={"groups": (first, *one.groups[1:])})
    prefill, decode = compiled(short, EngineOptions(run_id="r", python="p", token_budget=option)).processes
    assert flag(prefill, "--max-num-batched-tokens") == str(given)
    assert flag(decode, "--max-num-batched-tokens") == str(option)
