"""Compose files: one for each host, and one for the coordinator where there are several.

Containers use the host's network and IPC namespace, as engines under `serve` do: NIXL then moves KV caches over
the same transports, and every port is the host's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hexgen2.deploy.compile import compile_plan, used_nodes
from hexgen2.deploy.export.files import Export, File, origin, yaml_text
from hexgen2.deploy.export.settings import CONTAINER_PYTHON, ExportSettings
from hexgen2.deploy.export.sites import ContainerHosts, is_name
from hexgen2.deploy.export.words import OWN_ADDRESS, dns_label, dns_labels, render
from hexgen2.deploy.ports import counted_ports
from hexgen2.deploy.spec import ProcessSpec
from hexgen2.specs.model import Model
from hexgen2.specs.plan import Plan

LOADING_S = 1800
"""How long an engine may load before it counts as unhealthy."""

CONFIG_PATH = "/etc/hexgen2/coordinator.json"
HUB_CACHE = "/root/.cache/huggingface"
CHECK = "import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=4)"


def export(plan: Plan, model: Model, settings: ExportSettings, source: str) -> Export:
    """`compose.yaml` where all engines run on one host, else a file for each host and one for the
    coordinator."""
    site = ContainerHosts(plan.cluster, used_nodes(plan), settings.addresses)
    options = settings.engine_options(CONTAINER_PYTHON)
    deployment = compile_plan(plan, model, counted_ports(settings.first_port), options, source, site)
    by_host: dict[str, list[ProcessSpec]] = {}
    for process in deployment.processes:
        by_host.setdefault(process.host, []).append(process)
    writer = _Writer(plan, model, settings, site, {host: _variable(host) for host in by_host if is_name(host)})
    services = {
        host: {dns_label(process.name): writer.engine(process) for process in processes}
        for host, processes in by_host.items()
    }
    coordinator = writer.coordinator(deployment.coordinator.timeouts.drain_s)
    files = {"coordinator.json": File(deployment.coordinator.to_json())}
    if settings.api_keys is not None:
        files["api-keys"] = File(settings.api_keys, 0o600)
    if writer.variables:
        files[".env"] = File(_env_file(writer.variables))
    if len(by_host) == 1:
        ((host, engines),) = services.items()
        ready = {
            name: {"condition": "service_healthy"} for name, one in engines.items() if "healthcheck" in one
        }
        whole = {**engines, "coordinator": {**coordinator, "depends_on": ready}}
        files["compose.yaml"] = writer.file(host, whole)
        return Export(files, (*deployment.notes, "run `docker compose up` in the folder"))
    labels = dns_labels((processes[0].node for processes in by_host.values()), source, "cluster.nodes")
    names = {host: f"compose.{labels[processes[0].node]}.yaml" for host, processes in by_host.items()}
    for host, engines in services.items():
        files[names[host]] = writer.file(host, engines)
    files["compose.coordinator.yaml"] = writer.file(
        "any host that reaches the others", {"coordinator": coordinator}
    )
    where = ", ".join(f"{names[host]} on {host}" for host in by_host)
    notes = [
        *deployment.notes,
        f"copy the folder to every host and run `docker compose -f FILE up` with {where}, and "
        "compose.coordinator.yaml on any of them",
    ]
    if writer.variables:
        notes.append(f"fill in the addresses of {', '.join(writer.variables)} in .env first")
    return Export(files, tuple(notes))


@dataclass(frozen=True)
class _Writer:
    """``variables``: for each host that is known by name alone, the variable of `.env` with its IP address."""

    plan: Plan
    model: Model
    settings: ExportSettings
    site: ContainerHosts
    variables: Mapping[str, str]

    def file(self, where: str, services: Mapping[str, Any]) -> File:
        document: dict[str, Any] = {"name": dns_label(self.settings.name), "services": dict(services)}
        if "coordinator" in services:
            document["configs"] = {"coordinator": {"file": "./coordinator.json"}}
            if self.settings.api_keys is not None:
                document["secrets"] = {"api-keys": {"file": "./api-keys"}}
        if any(HUB_CACHE in str(service) for service in services.values()):
            document["volumes"] = {"hub-cache": {}}
        return File(yaml_text([document], (*origin(self.plan, "compose"), f"Runs on {where}.")))

    def engine(self, process: ProcessSpec) -> dict[str, Any]:
        references = {}
        if process.host in self.variables:
            references[OWN_ADDRESS] = _reference(self.variables[process.host])
        environment = {name: render(value, _escaped, references) for name, value in process.env.items()}
        if Path(self.model.location).is_absolute():
            place = self.model.location
            volume = {"type": "bind", "source": place, "target": place, "read_only": True}
        else:
            volume = {"type": "volume", "source": "hub-cache", "target": HUB_CACHE}
            environment["HF_TOKEN"] = "${HF_TOKEN:-}"
        service = {
            **self._container([render(word, _escaped, references) for word in process.argv]),
            "ipc": "host",
            "environment": environment,
            "volumes": [volume],
            "labels": {
                "hexgen2.group": process.group_id,
                "hexgen2.role": process.role,
                "hexgen2.gpus": ",".join(process.gpus),
            },
            **self._devices(process),
        }
        if process.readiness_url:
            service["healthcheck"] = self._healthcheck(process)
        return service

    def coordinator(self, drain_s: float) -> dict[str, Any]:
        settings = self.settings
        argv = [CONTAINER_PYTHON, "-m", "hexgen2.coordinator", "--config", CONFIG_PATH]
        argv += ["--host", settings.host, "--port", str(settings.port)]
        service: dict[str, Any] = {"configs": [{"source": "coordinator", "target": CONFIG_PATH}]}
        if settings.api_keys is not None:
            argv += ["--api-key-file", "/run/secrets/api-keys"]
            service["secrets"] = ["api-keys"]
        return {**self._container(argv), "stop_grace_period": f"{drain_s + 10:g}s", **service}

    def _container(self, argv: list[str]) -> dict[str, Any]:
        container: dict[str, Any] = {
            "image": self.settings.image,
            "entrypoint": argv[:1],
            "command": argv[1:],
            "network_mode": "host",
            "init": True,
            "restart": "unless-stopped",
        }
        if self.variables:
            container["extra_hosts"] = {host: _reference(name) for host, name in self.variables.items()}
        return container

    def _devices(self, process: ProcessSpec) -> dict[str, Any]:
        """What gives a container its GPUs, and those alone."""
        vendor = self.plan.cluster.gpu_by_id[process.gpus[0]].type.vendor
        numbers = self.site.host_devices(process.gpus)
        if vendor == "nvidia":
            wanted = {
                "driver": "nvidia",
                "device_ids": [str(number) for number in numbers],
                "capabilities": ["gpu"],
            }
            return {"deploy": {"resources": {"reservations": {"devices": [wanted]}}}}
        if vendor == "amd":
            # Docker hands out AMD GPUs by their render nodes, which are numbered from 128.
            nodes = [f"/dev/dri/renderD{128 + number}" for number in numbers]
            return {"devices": ["/dev/kfd", *nodes], "group_add": ["video", "render"]}
        return {}

    def _healthcheck(self, process: ProcessSpec) -> dict[str, Any]:
        url = urlsplit(process.readiness_url or "")
        address = process.readiness_url
        if process.host in self.variables:
            address = f"{url.scheme}://{_reference(self.variables[process.host])}:{url.port}{url.path}"
        return {
            "test": ["CMD", CONTAINER_PYTHON, "-c", CHECK, address],
            "interval": "10s",
            "timeout": "5s",
            "retries": 3,
            "start_period": f"{LOADING_S}s",
        }


def _variable(host: str) -> str:
    return f"HEXGEN2_ADDRESS_{dns_label(host).replace('-', '_').upper()}"


def _reference(variable: str) -> str:
    return f"${{{variable}:?write the IP address into .env}}"


def _escaped(text: str) -> str:
    """Compose would take a $ for the beginning of a variable."""
    return text.replace("$", "$$")


def _env_file(variables: Mapping[str, str]) -> str:
    lines = ["# The IP address of each host, as the other hosts reach it. Read by `docker compose`."]
    lines += [f"# {host}\n{name}=" for host, name in variables.items()]
    return "\n".join(lines) + "\n"
