"""``hexgen2 calibrate``: measure live engines and fit a GPU type's efficiencies to them.

Give the URLs of engines that run the same model on the same GPU type, each with its own TP and PP
(``--layout``, in the order of the URLs), or ``--local`` to have engines started on this machine, one layout
after the other. The profile it writes is for ``--profile`` of plan, estimate, simulate and serve.

Links: ``--serve-links PORT`` on one machine and ``--link HOST:PORT`` on another measure what is between them,
as an entry for a cluster file.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hexgen2.cli import inputs, output

if TYPE_CHECKING:
    from rich.console import Console

    from hexgen2.calibrate.drive import Grid
    from hexgen2.calibrate.fit import Fit, Measured
    from hexgen2.calibrate.handoff import Handoffs
    from hexgen2.specs.model import Model


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("calibrate", help="fit the cost model to live engines", description=__doc__)
    parser.add_argument("urls", nargs="*", metavar="URL", help="engines to measure (vLLM's OpenAI endpoint)")
    parser.add_argument("--local", action="store_true", help="start the engines on this machine")
    parser.add_argument("--model", metavar="NAME|DIR", help="the model that runs there")
    parser.add_argument("--gpu", default="cpu-1c", metavar="TYPE", help="its GPU type (default: %(default)s)")
    parser.add_argument(
        "--layout",
        action="append",
        type=_layout,
        default=[],
        metavar="TPxPP",
        help="TP and PP of each engine (default: 1x1; with --local 1x1, 2x1 and 1x2)",
    )
    parser.add_argument(
        "--handoff-from",
        metavar="URL",
        help="a prefill engine of that GPU type: measure also what handing KV caches to the URLs (decode "
        "engines) costs it and them",
    )
    inputs.add_api_key(parser)
    parser.add_argument("--name", help="name of the profile (default: that of the file)")
    parser.add_argument("--engine", default="vllm", metavar="TEXT", help="what the profile says of the engine")
    limits = parser.add_argument_group("how far to go")
    limits.add_argument(
        "--longest", type=inputs.count, default=16_384, metavar="N", help="tokens of a sequence"
    )
    limits.add_argument("--tokens", type=inputs.count, default=65_536, metavar="N", help="tokens of a batch")
    limits.add_argument("--batch", type=inputs.count, default=128, metavar="N", help="sequences of a batch")
    limits.add_argument("--repeats", type=inputs.count, default=3, metavar="N", help="times of each point")
    parser.add_argument(
        "--run-directory", type=Path, default=Path("build/calibrate"), metavar="DIR", help="for logs (--local)"
    )
    parser.add_argument("-o", "--output", metavar="PROFILE", help="profile to write (YAML)")
    links = parser.add_argument_group("links between machines")
    links.add_argument("--serve-links", type=inputs.port, metavar="PORT", help="let others measure from here")
    links.add_argument("--host", default="0.0.0.0", help="address to serve at (default: %(default)s)")
    links.add_argument("--link", metavar="HOST:PORT", help="measure from there to here")
    links.add_argument("--transport", choices=("nixl", "tcp"), default="nixl", help="default: %(default)s")
    links.add_argument(
        "--largest",
        type=inputs.count,
        default=2**26,
        metavar="BYTES",
        help="largest read (default: %(default)s); less for slow links",
    )
    output.add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    # NIXL, which measures links, is loaded into a process that has loaded none of the serving parts: it crashes
    # beside some of their libraries.
    if args.serve_links is not None:
        return _serve_links(args)
    if args.link:
        return _measure_link(args)
    return _calibrate(args)


def _calibrate(args: argparse.Namespace) -> int:
    import datetime
    import sys

    from hexgen2.calibrate.drive import Grid
    from hexgen2.calibrate.live import fit_live
    from hexgen2.calibrate.local import BATCH
    from hexgen2.calibrate.profile_file import profile_of, profile_text
    from hexgen2.deploy import EngineFailed
    from hexgen2.specs.catalog import gpu_type, gpu_type_names
    from hexgen2.specs.catalog.models import load_model
    from hexgen2.specs.errors import InputError

    for option in ("model", "output"):
        if getattr(args, option) is None:
            raise InputError(f"--{option}", "", "is missing", "give it")
    if args.gpu not in gpu_type_names():
        known = ", ".join(gpu_type_names())
        raise InputError("--gpu", "", f"unknown GPU type {args.gpu!r}", f"use one of {known}")
    if args.local == bool(args.urls):
        raise InputError("URL", "", "nothing to measure", "give URLs, or --local and no URL")
    if args.urls and args.layout and len(args.layout) != len(args.urls):
        raise InputError(
            "--layout", "", f"{len(args.layout)} for {len(args.urls)} URLs", "give one for each URL"
        )
    model, console = load_model(args.model), output.progress_console()
    batch = min(args.batch, BATCH) if args.local else args.batch
    grid = Grid(args.longest, args.tokens, batch, args.repeats)
    try:
        measured, handoffs = asyncio.run(_measure(args, model, grid, console))
    except EngineFailed as failure:
        print(f"hexgen2 calibrate: {failure}", file=sys.stderr)
        return 1
    if not measured:
        raise InputError("hexgen2 calibrate", "", "no point could be measured", "raise --longest or --tokens")
    fitted = fit_live(gpu_type(args.gpu), measured, handoffs)
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    source = f"hexgen2 calibrate: {model.name} on {args.gpu}, {len(measured)} points"
    name = args.name or Path(args.output).stem
    profile = profile_of(name, source, args.engine, date, {args.gpu: (measured, fitted)})
    output.write_text(args.output, profile_text(profile))
    console.print(f"profile written to {args.output}")
    if args.json:
        output.print_json({**profile.model_dump(mode="json"), "measured": _points(measured, fitted)})
    else:
        _show(output.result_console(), measured, fitted)
    return 0


async def _measure(
    args: argparse.Namespace, model: Model, grid: Grid, console: Console
) -> tuple[list[Measured], list[Handoffs]]:
    from hexgen2.calibrate import local
    from hexgen2.calibrate.drive import Engine, measure
    from hexgen2.calibrate.handoff import PROMPTS, measure_handoffs

    usual = [(1, 1), (2, 1), (1, 2)] if args.local else [(1, 1)] * len(args.urls)
    layouts: list[tuple[int, int]] = args.layout or usual
    found: list[Measured] = []
    handoffs: list[Handoffs] = []
    for place, (tp, pp) in enumerate(layouts):
        plan = local.one_group(args.gpu, model, args.model, tp, pp)
        layout = local.layout_of(plan)
        if args.urls:
            url = inputs.service(args.urls[place])
            console.print(f"measuring TP {tp}, PP {pp} at {url}")
            engine = Engine(url, model, layout, args.api_key)
            found += await measure(engine, grid, console.print)
            if args.handoff_from:
                source = replace(engine, url=inputs.service(args.handoff_from))
                prompts = [tokens for tokens in PROMPTS if tokens < grid.longest]
                console.print(f"measuring hand-overs from {source.url}")
                handoffs.append(await measure_handoffs(source, engine, None, prompts, grid.repeats))
        else:
            console.print(f"starting TP {tp}, PP {pp}, log in {args.run_directory}")
            async with local.running(plan, model, args.run_directory) as url:
                found += await measure(Engine(url, model, layout), grid, console.print)
    return found, handoffs


def _serve_links(args: argparse.Namespace) -> int:
    import signal
    import threading

    from hexgen2.calibrate.links import serving
    from hexgen2.specs.errors import InputError

    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    try:
        with serving(args.host, args.serve_links) as port:
            output.progress_console().print(f"others may measure links to port {port}; Ctrl-C ends it")
            ended.wait()
    except OSError as error:
        raise InputError(
            "--serve-links",
            "",
            f"cannot listen on {args.host}:{args.serve_links} ({error.strerror or error})",
            "give a free port, and --host an address of this machine",
        ) from None
    return 0


def _measure_link(args: argparse.Namespace) -> int:
    import importlib.util

    from hexgen2.calibrate.links import fit_link, measure, sizes_to
    from hexgen2.specs.errors import InputError

    host, _, port = args.link.rpartition(":")
    if not (host and port.isdigit()):
        raise InputError(
            "--link", "", f"{args.link!r} is not HOST:PORT", "give the other machine's address and port"
        )
    if args.transport == "nixl" and importlib.util.find_spec("nixl") is None:
        raise InputError("--transport", "", "NIXL is not installed here", "install it, or give tcp")
    times = measure(host.strip("[]"), int(port), args.transport, sizes_to(args.largest))
    fitted = fit_link(times)
    document = fitted.document()
    if args.json:
        points = [{"bytes": size, "seconds": seconds} for size, seconds in times.items()]
        output.print_json({**document, "transport": args.transport, "measured": points})
    else:
        console = output.result_console()
        console.print(f"{{gbps: {document['gbps']:.4g}, latency_ms: {document['latency_ms']:.4g}}}")
        console.print(f"over {args.transport}, {len(times)} sizes, median error {fitted.error:.1%}")
    return 0


def _layout(text: str) -> tuple[int, int]:
    """``TPxPP`` (argparse type)."""
    tp, _, pp = text.lower().partition("x")
    if not (tp.isdigit() and (pp or "1").isdigit() and int(tp) and int(pp or 1)):
        raise argparse.ArgumentTypeError(f"{text!r} is not TPxPP, such as 2x1")
    return int(tp), int(pp or 1)


def _points(measured: Sequence[Measured], fitted: Fit) -> list[dict[str, Any]]:
    return [
        {
            "phase": one.phase,
            "tp": one.layout[0].tp,
            "pp": len(one.layout),
            "batch": one.batch,
            "tokens": one.tokens,
            "seconds": one.seconds,
            "error": error,
        }
        for one, error in zip(measured, fitted.errors, strict=True)
    ]


def _show(console: Console, measured: Sequence[Measured], fitted: Fit) -> None:
    from rich.table import Table

    table = Table("parameter", "fitted", "95% confidence", "", box=None)
    for name, interval in fitted.intervals.items():
        known = "" if interval.known else "not determined by these measurements"
        table.add_row(name, f"{interval.value:.3g}", f"{interval.low:.3g} to {interval.high:.3g}", known)
    console.print(table)
    for tp, pp in dict.fromkeys((one.layout[0].tp, len(one.layout)) for one in measured):
        for phase in ("prefill", "decode"):
            errors = [
                abs(error)
                for one, error in zip(measured, fitted.errors, strict=True)
                if (one.phase, one.layout[0].tp, len(one.layout)) == (phase, tp, pp)
            ]
            if errors:
                middle = sorted(errors)[len(errors) // 2]
                console.print(f"TP {tp}, PP {pp}, {phase}: median error {middle:.1%} of {len(errors)} points")
    for what, error in fitted.apart.items():
        console.print(f"{what}: median error {error:.1%}")
