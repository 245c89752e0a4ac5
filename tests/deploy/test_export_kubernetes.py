"""Kubernetes manifests: valid by the published schemas, and the same engines as under `serve`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import kubernetes_validate
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hexgen2.coordinator import CoordinatorConfig
from hexgen2.deploy import compile_plan, counted_ports
from hexgen2.deploy.export import Export, ExportSettings
from hexgen2.deploy.export.words import OWN_ADDRESS, dns_label, dns_labels, render
from hexgen2.specs import InputError, Plan

from .builders import MODEL
from .exports import HUB_MODEL, PLANS, SETTINGS, exported, pair

NEWEST = kubernetes_validate.latest_version()
OLDEST = "1.29"


def documents(export: Export) -> Iterator[dict[str, Any]]:
    for name, file in export.files.items():
        if name != "kustomization.yaml":
            yield from yaml.safe_load_all(file.text)


def of_kind(export: Export, kind: str) -> list[dict[str, Any]]:
    return [document for document in documents(export) if document["kind"] == kind]


def templates(export: Export) -> list[dict[str, Any]]:
    """The pod templates of the engines."""
    found = []
    for document in documents(export):
        spec = document.get("spec", {})
        if document["kind"] == "LeaderWorkerSet":
            found += [spec["leaderWorkerTemplate"][f"{part}Template"] for part in ("leader", "worker")]
        elif "template" in spec and document["metadata"]["labels"]["app.kubernetes.io/component"] == "engine":
            found.append(spec["template"])
    return found


def container(template: dict[str, Any]) -> dict[str, Any]:
    (one,) = template["spec"]["containers"]
    return dict(one)


def environment(template: dict[str, Any]) -> dict[str, Any]:
    return {entry["name"]: entry.get("value") for entry in container(template)["env"]}


@pytest.mark.parametrize(
    ("which", "version"), [*((which, NEWEST) for which in PLANS), ("unlike workers", OLDEST)]
)
def test_manifests_are_valid(which: str, version: str) -> None:
    keys = SETTINGS.model_copy(update={"api_keys": "secret-1\nsecret-2\n"})
    for settings, model in ((SETTINGS, MODEL), (keys, HUB_MODEL)):
        export = exported(PLANS[which], "kubernetes", settings, model)
        for document in documents(export):
            if document["kind"] != "LeaderWorkerSet":
                kubernetes_validate.validate(document, version, strict=True)
                continue
            # Not Kubernetes' own: its pods are checked here, its fields in a test of its own.
            for part in ("leaderTemplate", "workerTemplate"):
                template = document["spec"]["leaderWorkerTemplate"][part]
                pod = {"apiVersion": "v1", "kind": "PodTemplate", "template": template}
                kubernetes_validate.validate(pod, version, strict=True)


@pytest.mark.parametrize("which", PLANS)
def test_names_fit_together(which: str) -> None:
    export = exported(PLANS[which], "kubernetes")
    assert "<" not in "".join(file.text for file in export.files.values()), "a placeholder is left"
    names = [(document["kind"], document["metadata"]["name"]) for document in documents(export)]
    assert len(set(names)) == len(names)
    labels = [template["metadata"]["labels"] for template in templates(export)]
    for service in of_kind(export, "Service"):
        if service["metadata"]["labels"]["app.kubernetes.io/component"] == "engine":
            wanted = service["spec"]["selector"].items()
            assert sum(wanted <= pod.items() for pod in labels) == 1, "a group has one first pod"
    for workload in (*of_kind(export, "Deployment"), *of_kind(export, "StatefulSet")):
        pod = workload["spec"]["template"]["metadata"]["labels"]
        assert workload["spec"]["selector"]["matchLabels"].items() <= pod.items()
    kustomization = yaml.safe_load(export.files["kustomization.yaml"].text)
    assert sorted([*kustomization["resources"], "kustomization.yaml"]) == sorted(export.files)


def test_an_engine_has_the_arguments_of_serve() -> None:
    """All that differs from the same plan under `serve` is what a pod sees around itself."""
    a_plan = PLANS["pair with addresses"]
    served = compile_plan(a_plan, MODEL, counted_ports(8000), SETTINGS.engine_options("python3"))
    by_group = {
        template["metadata"]["labels"]["hexgen2.io/group"]: template
        for template in templates(exported(a_plan, "kubernetes"))
    }
    for process in served.processes:
        template = by_group[process.group_id]
        argv = [*container(template)["command"], *container(template)["args"]]
        seen = {"0.0.0.0": process.host}
        assert [seen.get(word, word) for word in argv] == list(process.argv)
        env = environment(template)
        assert env.pop("POD_IP") is None  # the first, and from the pod's status
        own = {name: value for name, value in process.env.items() if value == process.host}
        assert {name: env.pop(name) for name in own} == dict.fromkeys(own, "$(POD_IP)")
        assert env.pop("CUDA_VISIBLE_DEVICES") == ",".join(map(str, range(len(process.gpus))))
        assert env == {
            name: value
            for name, value in process.env.items()
            if name not in own and name != "CUDA_VISIBLE_DEVICES"
        }


def test_the_pod_ip_is_known_before_it_is_used() -> None:
    for template in templates(exported(pair(), "kubernetes")):
        assert container(template)["env"][0]["name"] == "POD_IP"


def test_gpus_machines_and_probes() -> None:
    prefill, decode = templates(exported(pair(), "kubernetes"))
    assert container(prefill)["resources"] == {"limits": {"nvidia.com/gpu": "1"}}
    assert container(decode)["resources"] == {"limits": {"nvidia.com/gpu": "2"}}
    terms = decode["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    (expression,) = terms["nodeSelectorTerms"][0]["matchExpressions"]
    assert expression["key"] == "nvidia.com/gpu.product"
    assert "NVIDIA-A100-80GB-PCIe" in expression["values"]
    assert decode["spec"]["tolerations"][0]["key"] == "nvidia.com/gpu"
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container(decode)[name]["httpGet"] == {"path": "/health", "port": "http"}
    # The process listens at the port that the probe asks.
    args = container(decode)["args"]
    (http,) = [port for port in container(decode)["ports"] if port["name"] == "http"]
    assert args[args.index("--port") + 1] == str(http["containerPort"])


@pytest.mark.parametrize(
    ("which", "resources", "selector"),
    [
        ("AMD", {"limits": {"amd.com/gpu": "1"}}, None),
        ("CPU", {"requests": {"cpu": "1", "memory": "2048Mi"}}, {"hexgen2.io/gpu": "cpu-1c"}),
    ],
)
def test_other_vendors(which: str, resources: dict[str, Any], selector: dict[str, str] | None) -> None:
    first = templates(exported(PLANS[which], "kubernetes"))[0]
    assert container(first)["resources"] == resources
    assert first["spec"].get("nodeSelector") == selector


def test_pods_can_be_pinned_to_the_plans_nodes() -> None:
    settings = SETTINGS.model_copy(update={"pin": "node"})
    export = exported(pair(), "kubernetes", settings)
    assert [template["spec"]["nodeSelector"] for template in templates(export)] == [
        {"hexgen2.io/node": "a"},
        {"hexgen2.io/node": "b"},
    ]
    assert any("hexgen2.io/node=a, hexgen2.io/node=b" in note for note in export.notes)


def test_the_coordinator_reaches_engines_by_their_services() -> None:
    export = exported(pair(), "kubernetes")
    (config,) = of_kind(export, "ConfigMap")
    parsed = CoordinatorConfig.from_json(config["data"]["coordinator.json"])
    assert {engine.url for engine in parsed.engines} == {"http://hexgen2-p0:8000", "http://hexgen2-d0:8000"}
    ports = {
        service["metadata"]["name"]: {port["name"]: port["port"] for port in service["spec"]["ports"]}
        for service in of_kind(export, "Service")
    }
    assert ports == {
        "hexgen2-p0": {"http": 8000, "kv": 8001},
        "hexgen2-d0": {"http": 8000, "kv": 8001},
        "hexgen2": {"http": 8000},
    }
    coordinator = next(
        d for d in of_kind(export, "Deployment") if d["metadata"]["name"] == "hexgen2-coordinator"
    )
    args = container(coordinator["spec"]["template"])["args"]
    assert args[:2] == ["-m", "hexgen2.coordinator"]
    assert "--api-key-file" not in args


def test_api_keys_are_a_secret() -> None:
    settings = SETTINGS.model_copy(update={"api_keys": "k1\n"})
    export = exported(pair(), "kubernetes", settings)
    (secret,) = of_kind(export, "Secret")
    assert secret["stringData"] == {"api-keys": "k1\n"}
    assert export.files["api-keys.yaml"].mode == 0o600
    assert not any("k1" in file.text for name, file in export.files.items() if name != "api-keys.yaml")
    check_keys(export, secret["metadata"]["name"])


def test_an_existing_secret_can_hold_them() -> None:
    export = exported(pair(), "kubernetes", SETTINGS.model_copy(update={"api_key_secret": "mine"}))
    assert of_kind(export, "Secret") == []
    check_keys(export, "mine")


def check_keys(export: Export, secret: str) -> None:
    coordinator = next(
        d for d in of_kind(export, "Deployment") if d["metadata"]["name"] == "hexgen2-coordinator"
    )
    spec = coordinator["spec"]["template"]["spec"]
    assert [volume["secret"]["secretName"] for volume in spec["volumes"] if "secret" in volume] == [secret]
    args = spec["containers"][0]["args"]
    assert args[args.index("--api-key-file") + 1] == "/etc/hexgen2/keys/api-keys"


@pytest.mark.parametrize(("which", "size"), [("two ranks", 2), ("alike workers", 3)])
def test_alike_workers_are_a_leader_worker_set(which: str, size: int) -> None:
    export = exported(PLANS[which], "kubernetes")
    (one,) = of_kind(export, "LeaderWorkerSet")
    # The fields of leaderworkerset.x-k8s.io/v1, as its CRD has them.
    assert one["apiVersion"] == "leaderworkerset.x-k8s.io/v1"
    assert set(one["spec"]) == {"replicas", "startupPolicy", "leaderWorkerTemplate"}
    template = one["spec"]["leaderWorkerTemplate"]
    assert set(template) == {"size", "restartPolicy", "leaderTemplate", "workerTemplate"}
    assert (template["size"], template["restartPolicy"]) == (size, "RecreateGroupOnPodRestart")
    leader, worker = (container(template[f"{part}Template"])["args"] for part in ("leader", "worker"))
    for args, rank in ((leader, "0"), (worker, "$(LWS_WORKER_INDEX)")):
        assert args[args.index("--node-rank") + 1] == rank
        assert args[args.index("--nnodes") + 1] == str(size)
        # The service of the same name leads to the leader.
        assert args[args.index("--master-addr") + 1] == "hexgen2-p0"
    assert worker[1] == "hexgen2.vllm_plugin.headless"
    assert any("LeaderWorkerSet" in note for note in export.notes)


def test_unlike_workers_are_stateful_sets() -> None:
    """One template for all workers cannot send each stage to the GPU that it was planned for."""
    export = exported(PLANS["unlike workers"], "kubernetes")
    assert of_kind(export, "LeaderWorkerSet") == []
    sets = of_kind(export, "StatefulSet")
    assert [one["metadata"]["name"] for one in sets] == ["hexgen2-p0-0", "hexgen2-p0-1", "hexgen2-p0-2"]
    products = []
    for rank, one in enumerate(sets):
        assert one["spec"]["serviceName"] == "hexgen2-p0"
        args = container(one["spec"]["template"])["args"]
        assert args[args.index("--node-rank") + 1] == str(rank)
        affinity = one["spec"]["template"]["spec"]["affinity"]["nodeAffinity"]
        terms = affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
        products.append(terms[0]["matchExpressions"][0]["values"][0])
    assert products == ["NVIDIA-H100-80GB-HBM3", "NVIDIA-A100-80GB-PCIe", "NVIDIA-L40S"]
    # A rank without a server is started again when it cannot reach the first one.
    probe = container(sets[1]["spec"]["template"])["livenessProbe"]["exec"]["command"]
    assert probe[-2:] == ["hexgen2-p0", "8000"]


@pytest.mark.parametrize(
    ("model", "claim", "volume", "mount"),
    [
        (MODEL, None, {"hostPath": {"path": "/models/toy", "type": "Directory"}}, "/models/toy"),
        (MODEL, "weights", {"persistentVolumeClaim": {"claimName": "weights"}}, "/models/toy"),
        (HUB_MODEL, "cache", {"persistentVolumeClaim": {"claimName": "cache"}}, "/var/cache/huggingface"),
        (HUB_MODEL, None, None, None),
    ],
)
def test_where_the_model_is_from(model: Any, claim: str | None, volume: Any, mount: str | None) -> None:
    export = exported(pair(), "kubernetes", SETTINGS.model_copy(update={"model_claim": claim}), model)
    for template in templates(export):
        volumes = {entry.pop("name"): entry for entry in map(dict, template["spec"]["volumes"])}
        assert volumes.get("model") == volume
        mounts = {entry["name"]: entry["mountPath"] for entry in container(template)["volumeMounts"]}
        assert mounts.get("model") == mount
        names = [entry["name"] for entry in container(template)["env"]]
        assert ("HF_TOKEN" in names) == (model is HUB_MODEL)


def test_a_changed_config_gives_new_coordinator_pods() -> None:
    digests = []
    for model in (MODEL, MODEL.model_copy(update={"name": "other"})):
        export = exported(pair(), "kubernetes", model=model)
        coordinator = next(
            d for d in of_kind(export, "Deployment") if d["metadata"]["name"] == "hexgen2-coordinator"
        )
        digests.append(coordinator["spec"]["template"]["metadata"]["annotations"]["hexgen2.io/config"])
    assert digests[0] != digests[1]


def test_dollars_in_arguments_are_not_variables() -> None:
    export = exported(
        pair(), "kubernetes", ExportSettings(), MODEL.model_copy(update={"location": "/models/$(HOME)/$x"})
    )
    for template in templates(export):
        args = container(template)["args"]
        assert args[args.index("--model") + 1] == "/models/$$(HOME)/$$x"


def test_groups_whose_names_come_out_alike_are_refused() -> None:
    a_plan = pair()
    groups = tuple(
        group.model_copy(update={"id": name}) for group, name in zip(a_plan.groups, ("g.1", "g-1"), strict=True)
    )
    route = a_plan.routes[0].model_copy(update={"source": "g.1", "target": "g-1"})
    renamed: Plan = a_plan.model_copy(update={"groups": groups, "routes": (route,)})
    with pytest.raises(InputError, match=r"'g\.1' and 'g-1' both become 'g-1'; rename"):
        exported(renamed, "kubernetes")


@given(st.text(max_size=80))
def test_dns_labels_are_legal(text: str) -> None:
    label = dns_label(text)
    assert 1 <= len(label) <= 28
    assert label.isascii()
    assert label[0].isalpha()
    assert label[-1].isalnum()
    assert label.replace("-", "").isalnum()
    assert label == label.lower() == dns_label(label)
    assert dns_labels([text, text], "test", "x") == {text: label}


@given(st.lists(st.sampled_from(["a$", OWN_ADDRESS, "(x)", "<own", "-address>"]), max_size=6))
def test_rendering_escapes_all_but_the_placeholders(parts: list[str]) -> None:
    text = "".join(parts)
    out = render(text, lambda part: part.replace("$", "$$"), {OWN_ADDRESS: "$(POD_IP)"})
    assert out.replace("$(POD_IP)", OWN_ADDRESS).replace("$$", "$") == text
