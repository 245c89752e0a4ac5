"""``hexgen2 serve``: run a plan behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hexgen2.cli import inputs, output


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("serve", help="serve a plan", description=__doc__)
    parser.add_argument("plan", metavar="PLAN", help="plan file (JSON)")
    parser.add_argument(
        "--launcher",
        choices=("local", "ray"),
        default="local",
        help="where engines run: on this machine or on the nodes of a Ray cluster",
    )
    parser.add_argument("--ray-address", metavar="A", help="HOST:PORT of the cluster, if not this machine's")
    parser.add_argument("--engine", choices=("vllm", "emulated"), default="vllm")
    parser.add_argument("--host", default="127.0.0.1", help="address of the endpoint (default: %(default)s)")
    parser.add_argument("--port", type=inputs.port, default=8000, help="its port; 0 takes a free one")
    parser.add_argument(
        "--workers",
        type=inputs.count,
        default=1,
        metavar="N",
        help="processes that serve the endpoint, with one routing state (default: %(default)s)",
    )
    parser.add_argument("--api-key-file", type=Path, metavar="F", help="API keys that may ask, one a line")
    parser.add_argument("--tls-cert", type=Path, metavar="F", help="PEM certificate (chain): serve HTTPS")
    parser.add_argument("--tls-key", type=Path, metavar="F", help="its key")
    parser.add_argument("--otlp-traces-endpoint", metavar="URL", help="send OpenTelemetry traces there")
    parser.add_argument(
        "--overlap-kv",
        action="store_true",
        help="fetch KV caches while they are computed (with HexgenConnector)",
    )
    parser.add_argument("--weights", metavar="DIR|ID", help="where the model lies, if not where its name says")
    parser.add_argument(
        "--run-directory", type=Path, default=Path("build/serve"), metavar="DIR", help="for logs"
    )
    parser.add_argument(
        "--max-restarts",
        type=inputs.count_or_none,
        default=5,
        metavar="N",
        help="times in a row that an engine which ends is started again; 0: never (default: %(default)s)",
    )
    parser.add_argument(
        "--replan",
        choices=("off", "dry-run", "on"),
        default="off",
        help="follow the load and the fleet with the plan; dry-run only says what it would do (default: off)",
    )
    emulated = parser.add_argument_group("--engine emulated: no GPUs, made-up tokens, the cost model's times")
    emulated.add_argument(
        "--slowdown", type=inputs.positive, default=1.0, metavar="X", help="all times X times as long"
    )
    inputs.add_profiles(emulated)
    output.add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from hexgen2.coordinator import WorkersFailed
    from hexgen2.coordinator import run as event_loop
    from hexgen2.deploy import EngineFailed

    try:
        event_loop(_serve(args))
    except (EngineFailed, WorkersFailed) as failure:
        print(f"hexgen2 serve: {failure}", file=sys.stderr)
        return 1
    return 0


async def _serve(args: argparse.Namespace) -> None:
    from hexgen2.cli.platform import Emulation
    from hexgen2.cli.serving import Options, serving
    from hexgen2.deploy import RestartPolicy
    from hexgen2.specs.errors import InputError
    from hexgen2.specs.plan import load_plan

    if args.replan != "off" and args.engine == "emulated" and args.slowdown != 1.0:
        raise InputError(
            "--replan", "", "--slowdown makes engines slower than their plan says", "leave one of them out"
        )
    if args.engine != "emulated":
        for option, given in (("--slowdown", args.slowdown != 1.0), ("--profile", args.profile)):
            if given:
                raise InputError(option, "", "is for emulated engines", "add --engine emulated or leave it out")
    if args.ray_address is not None and args.launcher != "ray":
        raise InputError("--ray-address", args.ray_address, "is for --launcher ray", "add it or leave this out")
    options = Options(
        host=args.host,
        port=args.port,
        workers=args.workers,
        overlap_kv=args.overlap_kv,
        run_directory=args.run_directory,
        api_key_file=args.api_key_file,
        tls_cert=args.tls_cert,
        tls_key=args.tls_key,
        otlp_traces_endpoint=args.otlp_traces_endpoint,
        weights=args.weights,
        source=args.plan,
        restarts=RestartPolicy(tries=args.max_restarts),
        replan=None if args.replan == "off" else args.replan,
        launcher=args.launcher,
        ray_address=args.ray_address,
        emulation=Emulation(tuple(args.profile), args.slowdown) if args.engine == "emulated" else None,
    )
    plan = load_plan(args.plan)
    console = output.progress_console()
    async with serving(plan, options, console) as served:
        console.print(
            f"serving {plan.model} at {served.url}/v1; live page at {served.url}/live; Ctrl-C ends it"
        )
        if args.json:
            output.print_json({"url": served.url, "model": plan.model})
        await served.until_interrupted()
        console.print("ending: running requests may finish, then the engines stop")
