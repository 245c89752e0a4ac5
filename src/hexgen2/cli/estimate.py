"""``hexgen2 estimate``: the cost model's answer for one replica of one GPU type."""

from __future__ import annotations

import argparse

from hexgen2.cli import inputs, output

TOKENS, REQUESTS = inputs.count_up_to(10**9), inputs.count_up_to(10**6)
"""No engine takes more: a larger number is a slip."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("estimate", help="cost of one replica", description=__doc__)
    parser.add_argument("--gpu", required=True, metavar="TYPE")
    parser.add_argument("--model", required=True, metavar="NAME|DIR")
    parser.add_argument("--tp", type=inputs.count, default=1, metavar="N", help="tensor parallelism")
    parser.add_argument(
        "--pp", type=inputs.count, default=1, metavar="N", help="pipeline parallelism, even layers"
    )
    parser.add_argument("--prompt", type=TOKENS, required=True, metavar="S", help="prompt length in tokens")
    parser.add_argument("--batch", type=REQUESTS, required=True, metavar="B", help="requests in the batch")
    parser.add_argument(
        "--context", type=TOKENS, metavar="C", help="tokens per sequence at the decode step (default: S)"
    )
    inputs.add_profiles(parser)
    output.add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from hexgen2.cost import CostModel, StageShape
    from hexgen2.cost.profile_files import load_efficiencies
    from hexgen2.scheduler.layouts import valid_tps
    from hexgen2.specs.catalog import gpu_type, gpu_type_names
    from hexgen2.specs.catalog.models import load_model
    from hexgen2.specs.errors import InputError

    if args.gpu not in gpu_type_names():
        known = ", ".join(gpu_type_names())
        raise InputError("--gpu", "", f"unknown GPU type {args.gpu!r}", f"use one of {known}")
    gpu, model = gpu_type(args.gpu), load_model(args.model)
    if args.pp > model.layers:
        raise InputError(
            "--pp", "", f"{args.pp} stages but {model.layers} layers", f"use at most {model.layers}"
        )
    if args.tp not in (possible := valid_tps(model, max(args.tp, 8))):
        sizes = ", ".join(map(str, possible))
        raise InputError(
            "--tp", "", f"the heads of {model.name} do not divide over {args.tp} GPUs", f"use one of {sizes}"
        )
    cost = CostModel(model, load_efficiencies(args.profile))
    # The first stages take the layers that do not divide evenly, as vLLM's even split does.
    layers = [model.layers // args.pp + (place < model.layers % args.pp) for place in range(args.pp)]
    layout = tuple(
        StageShape(gpu, args.tp, count, gpu.link if args.tp > 1 else None, gpu.link if place else None)
        for place, count in enumerate(layers)
    )
    context = args.context or args.prompt
    document = {
        "gpu": gpu.name,
        "model": model.name,
        "tp": args.tp,
        "pp": args.pp,
        "prefill_s": cost.prefill_seconds(layout, [args.prompt] * args.batch),
        "decode_step_s": cost.decode_step_seconds(layout, args.batch, args.batch * context),
        "weight_bytes_per_gpu": max(cost.weight_bytes(layout)),
        "max_kv_tokens": cost.max_kv_tokens(layout),
    }
    if args.json:
        output.print_json(document)
        return 0
    console = output.result_console()
    console.print(f"{model.name} on {args.tp * args.pp}×{gpu.name}, TP {args.tp}, PP {args.pp}")
    console.print(f"prefill of {args.batch}×{args.prompt} tokens: {document['prefill_s']:.4g} s")
    console.print(
        f"decode step of {args.batch} at {context} tokens each: {document['decode_step_s'] * 1e3:.4g} ms"
    )
    console.print(f"weights per GPU: {document['weight_bytes_per_gpu'] / 2**30:.2f} GiB")
    console.print(f"KV cache: {document['max_kv_tokens']} tokens")
    if document["max_kv_tokens"] == 0:
        console.print("the weights do not fit", style="bold")
    return 0
