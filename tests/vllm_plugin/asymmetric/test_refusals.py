"""What a layout cannot be combined with is said in one line, before anything starts."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

from hexgen2.specs.errors import InputError
from hexgen2.vllm_plugin.asymmetric.config import PARTITION_VARIABLE, apply_layout
from hexgen2.vllm_plugin.asymmetric.layout import Layout
from hexgen2.vllm_plugin.asymmetric.refusals import WORKERS, check_config

CPU_WORKER = "vllm.v1.worker.cpu_worker.CPUWorker"
GPU_WORKER = "vllm.v1.worker.gpu_worker.Worker"


class Model(SimpleNamespace):
    """As much of vLLM's ModelConfig as is looked at: 8 layers, 8 heads, 4 KV heads."""

    def get_total_num_hidden_layers(self) -> int:
        return 8

    def get_total_num_kv_heads(self) -> int:
        return int(self.kv_heads)

    def verify_with_parallel_config(self, parallel: Any) -> None:
        if 8 % parallel.tensor_parallel_size:
            raise ValueError("Total number of attention heads (8) must be divisible by tensor parallel size.")


def config(**changes: Any) -> Any:
    """A configuration that passes; `changes` name fields as `part__field`."""
    built = SimpleNamespace(
        parallel_config=SimpleNamespace(
            data_parallel_size=1,
            prefill_context_parallel_size=1,
            decode_context_parallel_size=1,
            tensor_parallel_size=1,
            pipeline_parallel_size=2,
            world_size=2,
            nnodes=1,
            enable_eplb=False,
            enable_elastic_ep=False,
            use_ubatching=False,
            enable_hc_sp=False,
            enable_fault_tolerance=False,
            assigned_physical_gpu_ids=None,
            worker_cls=CPU_WORKER,
        ),
        model_config=Model(
            model="tiny",
            runner_type="generate",
            is_encoder_decoder=False,
            is_hybrid=False,
            use_mla=False,
            kv_heads=4,
            hf_text_config=SimpleNamespace(),
        ),
        load_config=SimpleNamespace(load_format="auto"),
        device_config=SimpleNamespace(device_type="cpu"),
        scheduler_config=SimpleNamespace(async_scheduling=False),
        use_v2_model_runner=False,
        speculative_config=None,
        lora_config=None,
        weight_transfer_config=None,
        ec_transfer_config=None,
        kv_transfer_config=None,
    )
    for name, value in changes.items():
        *parts, field = name.split("__")
        target: Any = built
        for part in parts:
            target = getattr(target, part)
        setattr(target, field, value)
    return built


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    for name in ("VLLM_DISTRIBUTED_USE_SPLIT_GROUP", PARTITION_VARIABLE):
        monkeypatch.delenv(name, raising=False)


def refused(layout: str, **changes: Any) -> str:
    with pytest.raises(InputError) as caught:
        check_config(config(**changes), Layout.parse(layout, "--layout"))
    return str(caught.value)


@pytest.mark.parametrize("layout", ["1x8", "2x5+1x3", "1x2+2x5+1x1", "4x1+8x7", "2x5@0+1x3@1"])
def test_ordinary_engines_pass(layout: str) -> None:
    check_config(config(), Layout.parse(layout, "--layout"))


@pytest.mark.parametrize(
    ("changes", "option"),
    [
        ({"parallel_config__data_parallel_size": 2}, "--data-parallel-size"),
        ({"parallel_config__prefill_context_parallel_size": 2}, "--prefill-context-parallel-size"),
        ({"parallel_config__decode_context_parallel_size": 2}, "--decode-context-parallel-size"),
        ({"parallel_config__enable_eplb": True}, "--enable-eplb"),
        ({"parallel_config__enable_elastic_ep": True}, "--enable-elastic-ep"),
        ({"parallel_config__use_ubatching": True}, "--enable-dbo"),
        ({"parallel_config__enable_hc_sp": True}, "--enable-hc-sp"),
        ({"parallel_config__enable_fault_tolerance": True}, "--enable-fault-tolerance"),
        ({"parallel_config__assigned_physical_gpu_ids": [0, 1]}, "--device-ids"),
        ({"parallel_config__worker_cls": "somebody.Worker"}, "--worker-cls"),
        ({"speculative_config": object()}, "--speculative-config"),
        ({"lora_config": object()}, "--enable-lora"),
        ({"weight_transfer_config": object()}, "--weight-transfer-config"),
        ({"ec_transfer_config": object()}, "--ec-transfer-config"),
        ({"load_config__load_format": "sharded_state"}, "--load-format"),
        ({"model_config__runner_type": "pooling"}, "model: runs as pooling"),
        ({"model_config__is_encoder_decoder": True}, "model: is an encoder-decoder"),
        ({"model_config__is_hybrid": True}, "mixes kinds of attention layers"),
        (
            {
                "model_config__hf_text_config": SimpleNamespace(
                    layer_types=["full_attention", "sliding_attention"]
                )
            },
            "mixes kinds of attention layers",
        ),
        ({"use_v2_model_runner": True}, "VLLM_USE_V2_MODEL_RUNNER: runs no pipelines on CPU"),
        ({"scheduler_config__async_scheduling": True}, "--async-scheduling"),
    ],
)
def test_what_is_not_supported_is_named(changes: dict[str, Any], option: str) -> None:
    message = refused("2x5+1x3", **changes)
    assert option in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("layout", "problem"),
    [
        ("2x5+1x2", "stages: hold 7 layers, tiny has 8"),
        ("1x5+3x3", "stages[1].tp: Total number of attention heads (8) must be divisible"),
    ],
)
def test_a_layout_that_does_not_fit_the_model_is_refused(layout: str, problem: str) -> None:
    assert problem in refused(layout)


def test_tp_and_kv_heads_must_divide_one_another() -> None:
    assert "stages[0].tp: 2 neither divides the 3 KV heads" in refused("2x5+1x3", model_config__kv_heads=3)
    check_config(config(model_config__kv_heads=1), Layout.parse("8x5+1x3", "--layout"))  # replicated heads
    check_config(
        config(model_config__kv_heads=3, model_config__use_mla=True), Layout.parse("2x5+1x3", "--layout")
    )


@pytest.mark.parametrize(
    ("name", "value", "layout"),
    [
        ("VLLM_DISTRIBUTED_USE_SPLIT_GROUP", "1", "2x5+1x3"),
        (PARTITION_VARIABLE, "4,4", "2x5+1x3"),
        ("VLLM_CPU_OMP_THREADS_BIND", "auto", "2x5@0+1x3@1"),
    ],
)
def test_variables_that_contradict_the_layout_are_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, layout: str
) -> None:
    monkeypatch.setenv(name, value)
    assert name in refused(layout)


def test_the_gpu_runner_may_schedule_asynchronously() -> None:
    on_gpu = {"device_config__device_type": "cuda", "parallel_config__worker_cls": GPU_WORKER}
    gpu = config(use_v2_model_runner=True, scheduler_config__async_scheduling=True, **on_gpu)
    check_config(gpu, Layout.parse("2x5+1x3", "--layout"))


def test_mixed_attention_runs_where_all_stages_have_one_tp() -> None:
    mixed = config(model_config__hf_text_config=SimpleNamespace(layer_types=["full", "sliding"]))
    check_config(mixed, Layout.parse("2x5+2x3", "--layout"))


class Stock:
    """A connector that knows nothing of layouts."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None: ...


class Aware(Stock):
    layout_aware = True


@pytest.mark.parametrize(
    ("connector", "layout", "passes"),
    [("Stock", "2x5+1x3", False), ("Stock", "2x5+2x3", True), ("Aware", "2x5+1x3", True)],
)
def test_connectors_must_know_of_unlike_tps(connector: str, layout: str, passes: bool) -> None:
    pytest.importorskip("vllm")
    transfer = SimpleNamespace(kv_connector=connector, kv_connector_module_path=__name__)
    if passes:
        check_config(config(kv_transfer_config=transfer), Layout.parse(layout, "--layout"))
    else:
        assert "Stock takes one TP for that of all stages" in refused(layout, kv_transfer_config=transfer)


@pytest.mark.parametrize(
    ("layout", "tp", "pp", "world", "nodes", "partition"),
    [
        ("2x5+1x3", 1, 2, 3, 1, "5,3"),
        ("2x5+2x3", 2, 2, 4, 1, "5,3"),
        ("1x2@0+2x5@1+1x1@0", 1, 3, 4, 2, "2,5,1"),
    ],
)
def test_the_configuration_becomes_the_layouts(
    monkeypatch: pytest.MonkeyPatch, layout: str, tp: int, pp: int, world: int, nodes: int, partition: str
) -> None:
    monkeypatch.setenv(PARTITION_VARIABLE, "")
    changed = config()
    apply_layout(changed, Layout.parse(layout, "--layout"))
    parallel = changed.parallel_config
    assert (parallel.tensor_parallel_size, parallel.pipeline_parallel_size) == (tp, pp)
    assert (parallel.world_size, parallel.nnodes) == (world, nodes)
    assert parallel.worker_cls == WORKERS[CPU_WORKER]
    assert os.environ[PARTITION_VARIABLE] == partition
