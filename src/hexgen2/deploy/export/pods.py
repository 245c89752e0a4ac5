"""A process as a pod: its labels, where it may run, its container, its probes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hexgen2.deploy.export.settings import CONTAINER_PYTHON, ExportSettings
from hexgen2.deploy.export.words import NODE_RANK, OWN_ADDRESS, dns_label, render
from hexgen2.deploy.spec import ProcessSpec
from hexgen2.specs.catalog import product_labels
from hexgen2.specs.gpu import GpuType
from hexgen2.specs.model import Model
from hexgen2.specs.plan import Plan

Manifest = dict[str, Any]

RESOURCES = {"nvidia": "nvidia.com/gpu", "amd": "amd.com/gpu"}
PRODUCT_LABELS = {"nvidia": "nvidia.com/gpu.product", "amd": "amd.com/gpu.product-name"}
LOADING_S = 3600
"""How long an engine may load before Kubernetes starts it again."""

HUB_CACHE = "/var/cache/huggingface"
REACHES = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 5)"


@dataclass(frozen=True)
class PodWriter:
    """What the manifests of one export have in common; ``name`` is the prefix of all of them."""

    plan: Plan
    model: Model
    settings: ExportSettings
    name: str

    def manifest(
        self, api: str, kind: str, name: str, component: str, process: ProcessSpec | None = None
    ) -> Manifest:
        """The head of a manifest; labelled with its group where it belongs to one."""
        return {
            "apiVersion": api,
            "kind": kind,
            "metadata": {"name": name, "labels": self._labels(component, process)},
        }

    def selector(self, process: ProcessSpec) -> dict[str, str]:
        """The labels that single out the pod of a process."""
        return {
            "app.kubernetes.io/name": self.name,
            "hexgen2.io/group": dns_label(process.group_id),
            "hexgen2.io/rank": str(process.rank),
        }

    def alike(self, processes: Sequence[ProcessSpec]) -> bool:
        """Whether one template serves for all of them: the same arguments (but for the rank, which is a
        placeholder in them) on machines of the same kind."""
        first = processes[0]
        return all(
            (process.argv, process.env) == (first.argv, first.env)
            and self._placement(process) == self._placement(first)
            for process in processes
        )

    def template(
        self, process: ProcessSpec, rank: str, head: ProcessSpec | None = None, common: bool = False
    ) -> Manifest:
        """The pod of a process. ``rank`` is what its arguments say for its rank; ``head``: whom a rank without
        a server has to reach, or it is started again; ``common``: the template stands for several ranks."""
        labels = {**self._labels("engine", process), **self.selector(process)}
        if common:
            labels["hexgen2.io/rank"] = "other"
        volumes = [{"name": "shm", "emptyDir": {"medium": "Memory"}}]  # ranks and NCCL meet in /dev/shm
        if volume := self._model_volume():
            volumes.append(volume)
        return {
            "metadata": {"labels": labels, "annotations": {"hexgen2.io/gpus": ",".join(process.gpus)}},
            "spec": {
                **self._placement(process),
                "enableServiceLinks": False,  # a service called vllm would set VLLM_PORT
                "automountServiceAccountToken": False,
                "terminationGracePeriodSeconds": 60,
                "containers": [self._container(process, rank, head)],
                "volumes": volumes,
            },
        }

    def _container(self, process: ProcessSpec, rank: str, head: ProcessSpec | None) -> Manifest:
        references = {OWN_ADDRESS: "$(POD_IP)", NODE_RANK: rank}

        def word(text: str) -> str:
            return render(text, _escaped, references)

        # First, since the values after it refer to it.
        env: list[Manifest] = [{"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}]
        env += [{"name": name, "value": word(value)} for name, value in process.env.items()]
        mounts: list[Manifest] = [{"name": "shm", "mountPath": "/dev/shm"}]
        if Path(self.model.location).is_absolute():
            mounts.append({"name": "model", "mountPath": self.model.location, "readOnly": True})
        else:
            token = {"name": f"{self.name}-hub-token", "key": "token", "optional": True}
            env.append({"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": token}})
            if self.settings.model_claim:
                env.append({"name": "HF_HOME", "value": HUB_CACHE})
                mounts.append({"name": "model", "mountPath": HUB_CACHE})
        container: Manifest = {
            "name": "engine",
            "image": self.settings.image,
            "command": [process.argv[0]],
            "args": [word(text) for text in process.argv[1:]],
            "env": env,
            "resources": self._resources(process),
            "volumeMounts": mounts,
        }
        if process.ports:
            ports = process.ports.items()
            container["ports"] = [
                {"name": purpose, "containerPort": port, "protocol": "TCP"} for purpose, port in ports
            ]
        if process.readiness_url:
            path = urlsplit(process.readiness_url).path
            container["startupProbe"] = http_probe(path, "http", period_s=10, failures=LOADING_S // 10)
            container["readinessProbe"] = http_probe(path, "http", period_s=5, failures=2)
            container["livenessProbe"] = http_probe(path, "http", period_s=10, failures=3)
        elif head is not None:
            command = [CONTAINER_PYTHON, "-c", REACHES, head.host, str(head.ports["http"])]
            probe = {"exec": {"command": command}, "periodSeconds": 10, "timeoutSeconds": 8}
            container["startupProbe"] = {**probe, "failureThreshold": LOADING_S // 10}
            container["livenessProbe"] = {**probe, "failureThreshold": 3}
        return container

    def _placement(self, process: ProcessSpec) -> Manifest:
        """On which machines a pod may run: those of the plan's node, or those with its GPU type."""
        kind = self._type(process)
        placement: Manifest = {}
        if kind.vendor in RESOURCES:
            taint = {"key": RESOURCES[kind.vendor], "operator": "Exists", "effect": "NoSchedule"}
            placement["tolerations"] = [taint]
        if self.settings.pin == "node":
            return {**placement, "nodeSelector": {"hexgen2.io/node": dns_label(process.node)}}
        products = product_labels(kind.name)
        if not products:  # nothing labels machines with it of itself
            return {**placement, "nodeSelector": {"hexgen2.io/gpu": kind.name}}
        wanted = {"key": PRODUCT_LABELS[kind.vendor], "operator": "In", "values": list(products)}
        terms = {"nodeSelectorTerms": [{"matchExpressions": [wanted]}]}
        return {
            **placement,
            "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": terms}},
        }

    def _resources(self, process: ProcessSpec) -> Manifest:
        kind, count = self._type(process), len(process.gpus)
        if kind.vendor in RESOURCES:
            return {"limits": {RESOURCES[kind.vendor]: str(count)}}
        memory_mib = int(kind.memory_bytes * count / 2**20)
        return {"requests": {"cpu": str(count), "memory": f"{memory_mib}Mi"}}

    def _model_volume(self) -> Manifest | None:
        if self.settings.model_claim:
            return {"name": "model", "persistentVolumeClaim": {"claimName": self.settings.model_claim}}
        if Path(self.model.location).is_absolute():
            return {"name": "model", "hostPath": {"path": self.model.location, "type": "Directory"}}
        return None

    def _type(self, process: ProcessSpec) -> GpuType:
        return self.plan.cluster.gpu_by_id[process.gpus[0]].type

    def _labels(self, component: str, process: ProcessSpec | None) -> dict[str, str]:
        labels = {
            "app.kubernetes.io/name": self.name,
            "app.kubernetes.io/component": component,
            "app.kubernetes.io/managed-by": "hexgen2",
        }
        if process is not None:
            labels |= {"hexgen2.io/group": dns_label(process.group_id), "hexgen2.io/role": process.role}
        return labels


def http_probe(path: str, port: str, period_s: int, failures: int) -> Mapping[str, Any]:
    """An HTTP probe; its request may take five seconds."""
    return {
        "httpGet": {"path": path, "port": port},
        "periodSeconds": period_s,
        "timeoutSeconds": 5,
        "failureThreshold": failures,
    }


def _escaped(text: str) -> str:
    """Kubernetes would take $(X) for a variable."""
    return text.replace("$", "$$")
