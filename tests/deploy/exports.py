"""Plans for the tests of exports: hosts known and unknown, one process and several, all vendors."""

from __future__ import annotations

from hexgen2.deploy import free_ports
from hexgen2.deploy.export import Export, ExportSettings, Target, export_plan
from hexgen2.deploy.ports import is_free
from hexgen2.specs import Model, Plan

from .builders import MODEL, cluster, group, plan

H100 = "H100-80G-SXM"
A100 = "A100-80G-PCIe"
SETTINGS = ExportSettings(python="/opt/venv/bin/python", image="registry.test/hexgen2:1")
HUB_MODEL = MODEL.model_copy(update={"location": "org/toy"})


def pair(**hosts: str) -> Plan:
    """A prefill and a decode group on a node each; nodes as a="10.0.0.1"."""
    nodes = [
        {"name": name, "gpu": gpu, "count": 2, **({"host": hosts[name]} if name in hosts else {})}
        for name, gpu in (("a", H100), ("b", A100))
    ]
    return plan(
        cluster(*nodes),
        [group("p0", "prefill", (["a/1"], 8)), group("d0", "decode", (["b/0", "b/1"], 8))],
        ("p0", "d0", 1.0),
    )


def one_host(gpu: str = H100) -> Plan:
    return plan(
        cluster({"name": "a", "gpu": gpu, "count": 2, "host": "127.0.0.1"}),
        [group("p0", "prefill", (["a/0"], 8)), group("d0", "decode", (["a/1"], 8))],
        ("p0", "d0", 1.0),
    )


def spanning(*kinds: str) -> Plan:
    """A pipelined prefill group with a stage on a node of each kind, and a decode group."""
    nodes = [(f"n{i}", kind, 1) for i, kind in enumerate(kinds)]
    stages = [([f"n{i}/0"], 1) for i in range(len(kinds) - 1)]
    stages.append(([f"n{len(kinds) - 1}/0"], 8 - len(stages)))
    return plan(
        cluster(*nodes, ("d", H100, 1)),
        [group("p0", "prefill", *stages), group("d0", "decode", (["d/0"], 8))],
        ("p0", "d0", 1.0),
    )


PLANS = {
    "pair without hosts": pair(),
    "pair with addresses": pair(a="10.0.0.1", b="10.0.0.2"),
    "pair with names": pair(a="gpu1.lan", b="gpu2.lan"),
    "one host": one_host(),
    "AMD": one_host("MI300X"),
    "CPU": plan(
        cluster(("a", "cpu-1c", 1), ("b", "cpu-2c-4g", 1)),
        [group("p0", "prefill", (["a/0"], 8)), group("d0", "decode", (["b/0"], 8))],
        ("p0", "d0", 1.0),
    ),
    "two ranks": spanning(H100, A100),
    "alike workers": spanning(H100, A100, A100),
    "unlike workers": spanning(H100, A100, "L40S"),
    "colocated": plan(cluster(("a", H100, 1)), [group("c0", "colocated", (["a/0"], 8))]),
}


def exported(a_plan: Plan, target: Target, settings: ExportSettings = SETTINGS, model: Model = MODEL) -> Export:
    return export_plan(a_plan, model, target, settings)


def run_of_free_ports(count: int) -> tuple[int, int]:
    """A free port, and another that is the first of ``count`` free ones."""
    port_on = free_ports()
    endpoint = port_on("127.0.0.1")
    while True:
        first = port_on("127.0.0.1")
        wanted = range(first, first + count)
        if endpoint not in wanted and all(is_free("127.0.0.1", port) for port in wanted):
            return endpoint, first
