"""Shell scripts that a person can read: one for each host, and the coordinator's where there are several."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from functools import partial
from importlib import resources
from urllib.parse import urlsplit

from hexgen2.deploy.compile import compile_plan, used_nodes
from hexgen2.deploy.export.files import Export, File, origin
from hexgen2.deploy.export.settings import ExportSettings
from hexgen2.deploy.export.sites import NamedHosts, is_name
from hexgen2.deploy.export.words import NODE_RANK, OWN_ADDRESS, dns_labels, render
from hexgen2.deploy.ports import counted_ports
from hexgen2.deploy.processes import GRACE_S
from hexgen2.deploy.spec import Deployment, ProcessSpec
from hexgen2.specs.model import Model
from hexgen2.specs.plan import Plan

COORDINATOR_SPARE_S = 10
"""What the coordinator may take to leave beyond draining."""


def export(plan: Plan, model: Model, settings: ExportSettings, source: str) -> Export:
    """`start.sh` where all engines run on one host, else a script for each host and one for the coordinator."""
    site = NamedHosts(plan.cluster, used_nodes(plan), settings.addresses)
    options = settings.engine_options(settings.python)
    deployment = compile_plan(plan, model, counted_ports(settings.first_port), options, source, site)
    by_host: dict[str, list[ProcessSpec]] = {}
    for process in deployment.processes:
        by_host.setdefault(process.host, []).append(process)
    files = {
        "common.sh": File(_packaged("hexgen2.deploy.export", "common.sh")),
        "guard.py": File(_packaged("hexgen2.deploy", "guard.py")),
        "coordinator.json": File(deployment.coordinator.to_json()),
    }
    if settings.api_keys is not None:
        files["api-keys"] = File(settings.api_keys, 0o600)
    script = partial(_script, plan, deployment, settings)
    if len(by_host) == 1:
        (processes,) = by_host.values()
        files["start.sh"] = File(script("this machine", processes, coordinator=True), 0o755)
        return Export(files, (*deployment.notes, "run start.sh; Ctrl-C ends it"))
    # A host is known by the first of its nodes.
    labels = dns_labels((processes[0].node for processes in by_host.values()), source, "cluster.nodes")
    names = {host: f"start-{labels[processes[0].node]}.sh" for host, processes in by_host.items()}
    for host, processes in by_host.items():
        files[names[host]] = File(script(f"host {host}", processes, coordinator=False), 0o755)
    files["start-coordinator.sh"] = File(script("any host", [], coordinator=True), 0o755)
    where = ", ".join(f"{names[host]} on {host}" for host in by_host)
    notes = [
        *deployment.notes,
        f"copy the folder to every host and run {where}, and start-coordinator.sh on any of them",
    ]
    if unknown := [host for host in by_host if is_name(host)]:
        notes.append(f"every host must know the names {', '.join(unknown)} (DNS or /etc/hosts)")
    return Export(files, tuple(notes))


def _script(
    plan: Plan,
    deployment: Deployment,
    settings: ExportSettings,
    where: str,
    processes: Sequence[ProcessSpec],
    coordinator: bool,
) -> str:
    # The script of the coordinator alone waits for everybody's engines.
    heads = [process for process in processes or deployment.processes if process.readiness_url]
    lines = [
        "#!/usr/bin/env bash",
        *(f"# {line}" for line in origin(plan, "shell")),
        f"# Runs on {where} until Ctrl-C. Variables that change it: HEXGEN2_PYTHON (the Python with hexgen2),",
        "# HEXGEN2_LOGS (folder for logs), HEXGEN2_TIMEOUT (seconds that loading may take)"
        + (", HEXGEN2_HOST, HEXGEN2_PORT." if coordinator else ", HEXGEN2_ADDRESS (own IP)."),
        "set -euo pipefail",
        'here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)',
        f"python=${{HEXGEN2_PYTHON:-{shlex.quote(settings.python)}}}",
        "# shellcheck source-path=SCRIPTDIR source=common.sh",
        'source "$here/common.sh"',
        "prepare",
    ]
    if processes:
        unset = sorted({name for process in processes for name in process.unset})
        lines += ["", "# Variables that would bend the engines away from the plan.", f"unset {' '.join(unset)}"]
        if any(OWN_ADDRESS in word for process in processes for word in (*process.argv, *process.env.values())):
            lines.append(f"own=$(own_address {shlex.quote(processes[0].host)})")
    for process in processes:
        lines += ["", *_engine(process)]
    if processes and heads:
        lines.append("")
    lines += [_wait(process, here=bool(processes)) for process in heads]
    if coordinator:
        lines += ["", *_coordinator(deployment, settings), "watch"]
    else:
        lines += ["", 'say "every engine of this host is ready"', "watch"]
    return "\n".join(lines) + "\n"


def _engine(process: ProcessSpec) -> list[str]:
    rank = f", rank {process.rank}" if process.rank or "--nnodes" in process.argv else ""
    words = [
        *(f"{name}={_quoted(value)}" for name, value in process.env.items()),
        *_lines_of(process.argv),
    ]
    return [
        f"# {process.name}: {process.role}{rank}, on {', '.join(process.gpus)}",
        f"start {shlex.quote(process.name)} {GRACE_S:g} \\",
        *(f"  {word} \\" for word in words[:-1]),
        f"  {words[-1]}",
    ]


def _lines_of(argv: Sequence[str]) -> list[str]:
    """An argument vector with each option and its values on a line of its own; its first word is the
    interpreter."""
    lines = [['"$python"']]
    for word in argv[1:]:
        if word.startswith("--"):
            lines.append([])
        lines[-1].append(_quoted(word))
    return [" ".join(line) for line in lines]


def _wait(process: ProcessSpec, here: bool) -> str:
    """``here``: in the script of the process's own host, whose name may mean a loopback address on it."""
    url = urlsplit(process.readiness_url or "")
    host = '"$own"' if here and is_name(process.host) else shlex.quote(process.host)
    return f"wait_ready {shlex.quote(process.name)} {host} {url.port} {url.path}"


def _coordinator(deployment: Deployment, settings: ExportSettings) -> list[str]:
    model = deployment.coordinator.served_model_names[0]
    grace = deployment.coordinator.timeouts.drain_s + COORDINATOR_SPARE_S
    keys = ' \\\n  --api-key-file "$here/api-keys"' if settings.api_keys is not None else ""
    return [
        "# The endpoint.",
        f"host=${{HEXGEN2_HOST:-{shlex.quote(settings.host)}}}",
        f"port=${{HEXGEN2_PORT:-{settings.port}}}",
        "case $host in 0.0.0.0 | ::) reach=127.0.0.1 ;; *) reach=$host ;; esac",
        f"start coordinator {grace:g} \\",
        '  "$python" -m hexgen2.coordinator \\',
        '  --config "$here/coordinator.json" \\',
        f'  --host "$host" --port "$port"{keys}',
        'endpoint=("$reach" "$port")',
        'wait_ready coordinator "${endpoint[@]}" /health',
        f'say {shlex.quote(f"serving {model} at")} "http://$reach:$port/v1; Ctrl-C ends it"',
    ]


def _quoted(word: str) -> str:
    """A word of the script: shell syntax is quoted, the own address is a variable."""
    if OWN_ADDRESS not in word and NODE_RANK not in word:
        return shlex.quote(word)
    return render(word, shlex.quote, {OWN_ADDRESS: '"$own"'})


def _packaged(package: str, name: str) -> str:
    return resources.files(package).joinpath(name).read_text(encoding="utf-8")
