"""``hexgen2 export``: write a plan as Kubernetes manifests, Compose files or shell scripts."""

from __future__ import annotations

import argparse
from pathlib import Path

from hexgen2.cli import inputs, output
from hexgen2.specs.errors import InputError


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("export", help="write a plan for Kubernetes or others", description=__doc__)
    parser.add_argument("plan", metavar="PLAN", help="plan file (JSON)")
    parser.add_argument("--to", required=True, choices=("kubernetes", "compose", "shell"))
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="DIR", help="folder for the files")
    parser.add_argument("--weights", metavar="DIR|ID", help="where the model lies, if not where its name says")
    parser.add_argument("--api-key-file", type=Path, metavar="F", help="API keys that may ask, one a line")
    parser.add_argument("--name", default="hexgen2", help="prefix of what is created (default: %(default)s)")
    parser.add_argument("--port", type=_port, default=8000, help="port of the endpoint (default: %(default)s)")
    hosts = parser.add_argument_group("shell and compose")
    hosts.add_argument("--host", default="127.0.0.1", help="address of the endpoint (default: %(default)s)")
    hosts.add_argument(
        "--address",
        action="append",
        default=[],
        type=_address,
        metavar="NODE=ADDRESS",
        help="address of a node, instead of the cluster file's host; may be given several times",
    )
    hosts.add_argument(
        "--first-port", type=_port, default=20_000, metavar="P", help="engines' ports count up from here"
    )
    hosts.add_argument("--python", help="interpreter of the shell scripts (default: the one running this)")
    pods = parser.add_argument_group("kubernetes and compose")
    pods.add_argument("--image", help="container image with HexGen-2 and vLLM (default: hexgen2:VERSION)")
    pods.add_argument(
        "--pin",
        choices=("type", "node"),
        default="type",
        help="run a pod on any machine with its GPU type, or on one labelled hexgen2.io/node=NODE (kubernetes)",
    )
    pods.add_argument("--api-key-secret", metavar="NAME", help="existing secret with the API keys (kubernetes)")
    pods.add_argument("--model-claim", metavar="NAME", help="volume claim with the model (kubernetes)")
    output.add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from pydantic import ValidationError

    from hexgen2.coordinator import ApiKeys
    from hexgen2.deploy.export import ExportSettings, export_plan
    from hexgen2.specs.catalog import load_model
    from hexgen2.specs.files import read_text
    from hexgen2.specs.plan import load_plan

    plan = load_plan(args.plan)
    model = load_model(plan.model)
    if args.weights:
        model = model.model_copy(update={"location": args.weights})
    chosen = {"python": args.python, "image": args.image}
    keys = None
    if args.api_key_file:
        ApiKeys.from_file(args.api_key_file)  # refuses a file without keys
        keys = read_text(args.api_key_file, "file with API keys")
    try:
        settings = ExportSettings(
            name=args.name,
            host=args.host,
            port=args.port,
            first_port=args.first_port,
            addresses=dict(args.address),
            api_keys=keys,
            pin=args.pin,
            api_key_secret=args.api_key_secret,
            model_claim=args.model_claim,
            **{name: value for name, value in chosen.items() if value},
        )
    except ValidationError as error:
        raise InputError.from_validation("options", error) from None
    export = export_plan(plan, model, args.to, settings, args.plan)
    console = output.progress_console()
    for name, file in export.files.items():
        _write(args.output / name, file.text, file.mode)
    others = sorted({entry.name for entry in args.output.iterdir()} - set(export.files))
    notes = list(export.notes)
    if others:
        notes.append(f"{args.output} also holds {', '.join(others)}, which this export did not write")
    console.print(f"{len(export.files)} files written to {args.output}")
    for note in notes:
        console.print(f"- {note}")
    if args.json:
        files = list(export.files)
        output.print_json({"to": args.to, "directory": str(args.output), "files": files, "notes": notes})
    return 0


def _write(path: Path, text: str, mode: int) -> None:
    """Write a file; one that others must not read is never readable to them on the way."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.touch(mode=mode)
        path.write_text(text, encoding="utf-8")
        path.chmod(mode)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(str(path), "", f"cannot be written ({reason})", "give another path") from None


def _address(text: str) -> tuple[str, str]:
    node, equals, address = text.partition("=")
    if not (node and equals and address):
        raise argparse.ArgumentTypeError(f"{text!r} is not NODE=ADDRESS")
    return node, address


def _port(text: str) -> int:
    port = inputs.port(text)
    if not port:
        raise argparse.ArgumentTypeError("0 is not a port that can be written down")
    return port
