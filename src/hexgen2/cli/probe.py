"""``hexgen2 probe``: find out what this machine has and write it as a cluster file."""

from __future__ import annotations

import argparse

from hexgen2.cli import inputs, output


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
    parser.add_argument("--host", default="127.0.0.1", help="address that others reach it by (%(default)s)")
    parser.add_argument("--name", help="name of the cluster (default: of this machine)")
    output.add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import datetime

    from hexgen2 import __version__
    from hexgen2.probe import Devices, cluster_text, probe_machine
    from hexgen2.specs.cluster import parse_cluster

    console = output.progress_console()
    devices: Devices = "cpu" if args.cpu_devices and args.devices == "auto" else args.devices
    found = probe_machine(devices, args.cpu_devices, args.name, args.host, console.print)
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
