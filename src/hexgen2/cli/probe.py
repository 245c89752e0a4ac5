"""``hexgen2 probe``: find out what this machine, or a Ray cluster, has and write it as a cluster file."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from hexgen2.cli import inputs, output

if TYPE_CHECKING:
    from hexgen2.probe import Found


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("probe", help="describe this machine as a cluster", description=__doc__)
    parser.add_argument("-o", "--output", required=True, metavar="CLUSTER", help="cluster file to write (YAML)")
    parser.add_argument(
        "--devices",
        choices=("auto", "gpu", "cpu"),
        default="auto",
        help="what to describe (default: the NVIDIA GPUs if there are some, else the CPU)",
    )
    parser.add_argument(
        "--cpu-devices", type=inputs.count, metavar="N", help="describe the CPU as so many devices"
    )
    parser.add_argument("--host", help="address that others reach it by (default: 127.0.0.1)")
    parser.add_argument("--name", help="name of the cluster (default: of this machine)")
    parser.add_argument(
        "--ray", metavar="ADDRESS", help="describe every node of this Ray cluster (`auto`: of this machine's)"
    )
    parser.add_argument(
        "--transport",
        choices=("nixl", "tcp"),
        help="how links between nodes are measured (default: NIXL where all have it and GPUs, else TCP)",
    )
    output.add_json(parser)
    parser.set_defaults(run=run)


def _found(args: argparse.Namespace, tell: Callable[[str], None]) -> Found:
    from hexgen2.probe import Devices, probe_machine
    from hexgen2.specs.errors import InputError

    if args.ray is None:
        if args.transport is not None:
            raise InputError("--transport", args.transport, "is for --ray", "add it or leave this out")
        devices: Devices = "cpu" if args.cpu_devices and args.devices == "auto" else args.devices
        return probe_machine(devices, args.cpu_devices, args.name, args.host or "127.0.0.1", tell)
    if args.host is not None:
        raise InputError("--host", args.host, "is not for --ray, which knows the nodes' own", "leave it out")
    from hexgen2.deploy.raycluster import connected
    from hexgen2.probe.over_ray import Asked, probe_cluster

    with connected(args.ray, "--ray") as ray:
        return probe_cluster(ray, Asked(args.devices, args.cpu_devices, args.name, args.transport), tell)


def run(args: argparse.Namespace) -> int:
    import datetime

    from hexgen2 import __version__
    from hexgen2.probe import cluster_text
    from hexgen2.specs.cluster import parse_cluster

    console = output.progress_console()
    found = _found(args, console.print)
    document = found.document()
    parse_cluster(document, args.output)  # what `plan` will do with it
    now = datetime.datetime.now(datetime.UTC)
    output.write_text(args.output, cluster_text(found, now, __version__))
    console.print(f"cluster written to {args.output}")
    if args.json:
        output.print_json(document)
    else:
        nodes = document["nodes"]
        for node in nodes:
            output.result_console().print(f"{node['name']}: {node['count']} x {node['gpu']}")
    return 0
