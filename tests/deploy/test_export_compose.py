"""Compose files: valid by the published Compose specification, and the same engines as under `serve`."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

import jsonschema
import pytest
import yaml

from hexgen2.coordinator import CoordinatorConfig
from hexgen2.deploy import compile_plan, counted_ports
from hexgen2.deploy.export import Export
from hexgen2.specs import InputError

from .builders import MODEL, cluster, group, plan
from .exports import HUB_MODEL, PLANS, SETTINGS, exported, one_host, pair


@pytest.fixture(scope="module")
def validator() -> jsonschema.Validator:
    """By the schema of the Compose specification, as the package `check-jsonschema` ships it."""
    text = resources.files("check_jsonschema").joinpath("builtin_schemas/vendor/compose-spec.json").read_text()
    schema = json.loads(text)
    return jsonschema.validators.validator_for(schema)(schema)


def compose_files(export: Export) -> dict[str, dict[str, Any]]:
    return {
        name: yaml.safe_load(file.text) for name, file in export.files.items() if name.startswith("compose.")
    }


@pytest.mark.parametrize("which", PLANS)
def test_files_are_valid(which: str, validator: jsonschema.Validator) -> None:
    keys = SETTINGS.model_copy(update={"api_keys": "k\n"})
    for settings, model in ((SETTINGS, MODEL), (keys, HUB_MODEL)):
        export = exported(PLANS[which], "compose", settings, model)
        documents = compose_files(export)
        for document in documents.values():
            validator.validate(document)
        assert sum("coordinator" in document["services"] for document in documents.values()) == 1
        assert "<own" not in "".join(file.text for file in export.files.values())
        CoordinatorConfig.from_json(export.files["coordinator.json"].text)


def test_the_schema_does_refuse(validator: jsonschema.Validator) -> None:
    document = compose_files(exported(one_host(), "compose"))["compose.yaml"]
    document["services"]["p0"]["commnad"] = []
    with pytest.raises(jsonschema.ValidationError, match="commnad"):
        validator.validate(document)


def test_an_engine_has_the_arguments_and_variables_of_serve() -> None:
    a_plan = one_host()
    served = compile_plan(a_plan, MODEL, counted_ports(20_000), SETTINGS.engine_options("python3"))
    services = compose_files(exported(a_plan, "compose"))["compose.yaml"]["services"]
    for process in served.processes:
        service = services[process.name]
        assert [*service["entrypoint"], *service["command"]] == list(process.argv)
        # A container is given its GPUs alone and counts them from 0.
        assert service["environment"] == {**process.env, "CUDA_VISIBLE_DEVICES": "0"}
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert device["device_ids"] == [process.env["CUDA_VISIBLE_DEVICES"]]
        assert service["healthcheck"]["test"][-1] == process.readiness_url
    assert services["coordinator"]["depends_on"] == {
        name: {"condition": "service_healthy"} for name in ("p0", "d0")
    }


def test_a_file_for_each_host_and_one_for_the_coordinator() -> None:
    export = exported(pair(a="10.0.0.1", b="10.0.0.2"), "compose")
    documents = compose_files(export)
    assert {name: list(document["services"]) for name, document in documents.items()} == {
        "compose.a.yaml": ["p0"],
        "compose.b.yaml": ["d0"],
        "compose.coordinator.yaml": ["coordinator"],
    }
    assert ".env" not in export.files
    assert documents["compose.b.yaml"]["services"]["d0"]["environment"]["VLLM_HOST_IP"] == "10.0.0.2"


def test_hosts_without_an_address_are_names_with_a_variable_each() -> None:
    export = exported(pair(), "compose")
    service = compose_files(export)["compose.a.yaml"]["services"]["p0"]
    assert export.files[".env"].text.endswith("# a\nHEXGEN2_ADDRESS_A=\n# b\nHEXGEN2_ADDRESS_B=\n")
    own = "${HEXGEN2_ADDRESS_A:?write the IP address into .env}"
    assert service["environment"]["VLLM_HOST_IP"] == own
    assert service["environment"]["VLLM_NIXL_SIDE_CHANNEL_HOST"] == own
    assert service["command"][service["command"].index("--host") + 1] == own
    assert service["extra_hosts"]["b"] == "${HEXGEN2_ADDRESS_B:?write the IP address into .env}"
    config = CoordinatorConfig.from_json(export.files["coordinator.json"].text)
    assert {engine.url for engine in config.engines} == {"http://a:20000", "http://b:20000"}
    assert any("fill in the addresses of a, b" in note for note in export.notes)


def test_given_addresses_go_before_the_cluster_files() -> None:
    settings = SETTINGS.model_copy(update={"addresses": {"a": "10.1.0.1", "b": "10.1.0.2"}})
    export = exported(pair(a="gpu1.lan"), "compose", settings)
    config = CoordinatorConfig.from_json(export.files["coordinator.json"].text)
    assert {engine.url for engine in config.engines} == {"http://10.1.0.1:20000", "http://10.1.0.2:20000"}
    assert ".env" not in export.files


def test_an_address_for_an_unknown_node_is_told() -> None:
    settings = SETTINGS.model_copy(update={"addresses": {"c": "10.1.0.1"}})
    with pytest.raises(InputError, match="--address: c: is not a node of the plan's cluster; name one of a, b"):
        exported(pair(), "compose", settings)


def test_keys_are_a_secret_and_dollars_no_variables() -> None:
    settings = SETTINGS.model_copy(update={"api_keys": "k1\n"})
    model = MODEL.model_copy(update={"location": "/models/$x"})
    export = exported(one_host(), "compose", settings, model)
    document = compose_files(export)["compose.yaml"]
    assert export.files["api-keys"].text == "k1\n"
    assert export.files["api-keys"].mode == 0o600
    assert document["secrets"] == {"api-keys": {"file": "./api-keys"}}
    command = document["services"]["coordinator"]["command"]
    assert command[command.index("--api-key-file") + 1] == "/run/secrets/api-keys"
    engine = document["services"]["p0"]["command"]
    assert engine[engine.index("--model") + 1] == "/models/$$x"


def test_models_are_mounted_or_cached() -> None:
    mounted = compose_files(exported(one_host(), "compose"))["compose.yaml"]
    assert mounted["services"]["p0"]["volumes"][0]["type"] == "bind"
    assert "volumes" not in mounted
    cached = compose_files(exported(one_host(), "compose", model=HUB_MODEL))["compose.yaml"]
    assert cached["services"]["p0"]["volumes"][0]["source"] == "hub-cache"
    assert list(cached["volumes"]) == ["hub-cache"]


def test_the_test_beds_nodes_are_one_host() -> None:
    export = exported(PLANS["CPU"], "compose")
    assert set(compose_files(export)) == {"compose.yaml"}


def test_a_node_beside_remote_ones_gets_a_name_too() -> None:
    nodes = [{"name": "a", "gpu": "L4", "count": 1, "host": "10.0.0.1"}, {"name": "b", "gpu": "L4", "count": 1}]
    a_plan = plan(
        cluster(*nodes),
        [group("p0", "prefill", (["a/0"], 8)), group("d0", "decode", (["b/0"], 8))],
        ("p0", "d0", 1.0),
    )
    config = CoordinatorConfig.from_json(exported(a_plan, "compose").files["coordinator.json"].text)
    assert {engine.url for engine in config.engines} == {"http://10.0.0.1:20000", "http://b:20000"}
