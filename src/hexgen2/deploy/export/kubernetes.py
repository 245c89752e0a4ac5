"""Kubernetes manifests: a workload and a service for each group, the coordinator, a kustomization over all."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hexgen2.deploy.compile import compile_plan, used_nodes
from hexgen2.deploy.export.files import Export, File, origin, yaml_text
from hexgen2.deploy.export.pods import Manifest, PodWriter, http_probe
from hexgen2.deploy.export.settings import CONTAINER_PYTHON, ExportSettings
from hexgen2.deploy.export.sites import Pods
from hexgen2.deploy.export.words import dns_label, dns_labels
from hexgen2.deploy.ports import counted_ports
from hexgen2.deploy.spec import Deployment, ProcessSpec
from hexgen2.specs.model import Model
from hexgen2.specs.plan import Plan

FIRST_PORT = 8000
"""Every pod has its own ports, so each counts from here."""

CONFIG_FOLDER = "/etc/hexgen2/config"
KEYS_FOLDER = "/etc/hexgen2/keys"
DRAIN_SPARE_S = 15


def export(plan: Plan, model: Model, settings: ExportSettings, source: str) -> Export:
    """A file for each group, `coordinator.yaml`, `api-keys.yaml` where keys are given, `kustomization.yaml`."""
    name = dns_label(settings.name)
    labels = dns_labels((group.id for group in plan.groups), source, "groups")
    services = {group: f"{name}-{label}" for group, label in labels.items()}
    options = settings.engine_options(CONTAINER_PYTHON)
    deployment = compile_plan(plan, model, counted_ports(FIRST_PORT), options, source, Pods(services))
    writer = PodWriter(plan, model, settings, name)
    heading = origin(plan, "kubernetes")
    notes = list(deployment.notes)
    resources: dict[str, File] = {}
    for group in plan.groups:
        processes = deployment.group(group.id)
        manifests = [_service(writer, services[group.id], processes)]
        manifests += _workload(writer, services[group.id], processes, notes)
        text = f"Group {group.id}: {group.role}, on {', '.join(group.gpus)}."
        resources[f"{labels[group.id]}.yaml"] = File(yaml_text(manifests, (*heading, text)))
    resources["coordinator.yaml"] = File(yaml_text(_coordinator(writer, deployment), heading))
    if settings.api_keys is not None:
        keys = writer.manifest("v1", "Secret", f"{name}-api-keys", "coordinator")
        keys |= {"type": "Opaque", "stringData": {"api-keys": settings.api_keys}}
        resources["api-keys.yaml"] = File(yaml_text([keys], (*heading, "Holds the keys in clear.")), 0o600)
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": list(resources),
    }
    files = {**resources, "kustomization.yaml": File(yaml_text([kustomization], heading))}
    notes += _preparations(plan, model, settings, source)
    notes.append("then run `kubectl apply -k FOLDER`")
    return Export(files, tuple(notes))


def _service(writer: PodWriter, name: str, processes: tuple[ProcessSpec, ...]) -> Manifest:
    """The name by which the coordinator, the other ranks and other engines reach a group's first pod. Headless:
    KV transfers and torch's rendezvous use ports and addresses of their own, which must be the pod's. Pods that
    are not ready are named too, since ranks meet before they are."""
    head = processes[0]
    service = writer.manifest("v1", "Service", name, "engine", head)
    service["spec"] = {
        "clusterIP": "None",
        "publishNotReadyAddresses": True,
        "selector": writer.selector(head),
        "ports": [{"name": purpose, "port": port, "protocol": "TCP"} for purpose, port in head.ports.items()],
    }
    return service


def _workload(
    writer: PodWriter, service: str, processes: tuple[ProcessSpec, ...], notes: list[str]
) -> list[Manifest]:
    """A Deployment for a group of one process; for several a LeaderWorkerSet, which starts all of them again
    when one dies; where its workers differ, and it has one template for them, a StatefulSet for each."""
    head, *others = processes
    if not others:
        deployment = writer.manifest("apps/v1", "Deployment", service, "engine", head)
        deployment["spec"] = {
            "replicas": 1,
            # A second pod beside the first would need a second set of GPUs.
            "strategy": {"type": "Recreate"},
            "selector": {"matchLabels": writer.selector(head)},
            "template": writer.template(head, "0"),
        }
        return [deployment]
    if writer.alike(others):
        leader_worker_set = writer.manifest(
            "leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet", f"{service}-ranks", "engine", head
        )
        leader_worker_set["spec"] = {
            "replicas": 1,
            "startupPolicy": "LeaderCreated",
            "leaderWorkerTemplate": {
                "size": len(processes),
                "restartPolicy": "RecreateGroupOnPodRestart",
                "leaderTemplate": writer.template(head, "0"),
                "workerTemplate": writer.template(others[0], "$(LWS_WORKER_INDEX)", common=True),
            },
        }
        notes.append(f"group {head.group_id} needs the LeaderWorkerSet controller in the cluster")
        return [leader_worker_set]
    notes.append(
        f"group {head.group_id} has unlike ranks, so each is a StatefulSet; when one of them fails, delete the "
        f"pods of the group (kubectl delete pod -l hexgen2.io/group={dns_label(head.group_id)})"
    )
    sets = []
    for process in processes:
        stateful_set = writer.manifest("apps/v1", "StatefulSet", f"{service}-{process.rank}", "engine", process)
        stateful_set["spec"] = {
            "replicas": 1,
            "serviceName": service,
            "selector": {"matchLabels": writer.selector(process)},
            "template": writer.template(process, str(process.rank), head=head),
        }
        sets.append(stateful_set)
    return sets


def _coordinator(writer: PodWriter, deployment: Deployment) -> list[Manifest]:
    name, settings = writer.name, writer.settings
    config = writer.manifest("v1", "ConfigMap", f"{name}-coordinator", "coordinator")
    text = deployment.coordinator.to_json()
    config["data"] = {"coordinator.json": text}
    service = writer.manifest("v1", "Service", name, "coordinator")
    selector = {"app.kubernetes.io/name": name, "app.kubernetes.io/component": "coordinator"}
    service["spec"] = {
        "selector": selector,
        "ports": [{"name": "http", "port": settings.port, "targetPort": "http", "protocol": "TCP"}],
    }
    argv = [CONTAINER_PYTHON, "-m", "hexgen2.coordinator", "--config", f"{CONFIG_FOLDER}/coordinator.json"]
    argv += ["--host", "0.0.0.0", "--port", str(settings.port)]
    mounts = [{"name": "config", "mountPath": CONFIG_FOLDER, "readOnly": True}]
    volumes: list[Mapping[str, Any]] = [{"name": "config", "configMap": {"name": f"{name}-coordinator"}}]
    secret = settings.api_key_secret or (f"{name}-api-keys" if settings.api_keys is not None else None)
    if secret:
        argv += ["--api-key-file", f"{KEYS_FOLDER}/api-keys"]
        mounts.append({"name": "keys", "mountPath": KEYS_FOLDER, "readOnly": True})
        volumes.append({"name": "keys", "secret": {"secretName": secret, "defaultMode": 0o400}})
    container = {
        "name": "coordinator",
        "image": settings.image,
        "command": argv[:1],
        "args": argv[1:],
        "ports": [{"name": "http", "containerPort": settings.port, "protocol": "TCP"}],
        "resources": {"requests": {"cpu": "500m", "memory": "512Mi"}},
        "volumeMounts": mounts,
        # 200 while a whole path is up. That engines are down is no reason to start the coordinator again.
        "readinessProbe": http_probe("/health", "http", period_s=5, failures=2),
        "livenessProbe": http_probe("/version", "http", period_s=10, failures=3),
    }
    workload = writer.manifest("apps/v1", "Deployment", f"{name}-coordinator", "coordinator")
    workload["spec"] = {
        "replicas": 1,
        "selector": {"matchLabels": selector},
        "template": {
            "metadata": {
                "labels": dict(workload["metadata"]["labels"]),
                # A changed config gives new pods.
                "annotations": {"hexgen2.io/config": hashlib.sha256(text.encode()).hexdigest()[:16]},
            },
            "spec": {
                "enableServiceLinks": False,
                "automountServiceAccountToken": False,
                "terminationGracePeriodSeconds": int(deployment.coordinator.timeouts.drain_s) + DRAIN_SPARE_S,
                "containers": [container],
                "volumes": volumes,
            },
        },
    }
    return [config, service, workload]


def _preparations(plan: Plan, model: Model, settings: ExportSettings, source: str) -> list[str]:
    """What has to be in the cluster before the manifests are of use."""
    notes = []
    if settings.pin == "node":
        wanted = dns_labels(sorted(used_nodes(plan)), source, "cluster.nodes")
        commands = ", ".join(f"hexgen2.io/node={label}" for label in wanted.values())
        notes.append(f"label the machines that are the plan's nodes: {commands}")
    if Path(model.location).is_absolute() and settings.model_claim is None:
        notes.append(f"every machine needs the model in {model.location} (or give --model-claim)")
    if settings.api_key_secret:
        notes.append(f"secret {settings.api_key_secret} must hold the keys, one a line, under `api-keys`")
    return notes
