"""``hexgen2 demo``: plan a mixed cluster, then plan, serve and check the local test bed with real engines."""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hexgen2.cli import inputs, output
from hexgen2.specs.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from hexgen2.specs.plan import Plan

MIXED_CLUSTER = "mixed-1.yaml"
LOCAL_CLUSTER = "local-cpu.yaml"
LOCAL_WORKLOAD = "fixed:64/128"
MAX_TOKENS = 40

QUESTIONS = (
    "What is HexGen-2?",
    "What is prefill?",
    "What is decode?",
    "What is a KV cache?",
    "What is tensor parallelism?",
    "What is pipeline parallelism?",
    "What is a GPU?",
    "What is TTFT?",
    "What is TPOT?",
    "What is throughput?",
    "What is the capital of France?",
    "What is two plus three?",
)
OPENINGS = (
    "Once upon a time",
    "The little fox",
    "One morning, a girl named",
    "In the garden there was",
    "The old man and the",
    "A small bird",
    "Once upon a time there was a cat who",
    "The sun was",
    "A boy and his dog",
    "In a house by the sea",
    "One day the rabbit",
    "The queen said",
)


@dataclass(frozen=True)
class Answer:
    """What a client got for one prompt; seconds from sending it."""

    prompt: str
    chat: bool
    streamed: bool
    text: str
    tokens: int
    ttft_s: float | None
    e2e_s: float

    @property
    def tpot_s(self) -> float | None:
        if self.ttft_s is None or self.tokens < 2:
            return None
        return (self.e2e_s - self.ttft_s) / (self.tokens - 1)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("demo", help="plan and serve on this machine", description=__doc__)
    parser.add_argument("--keep", action="store_true", help="keep serving until Ctrl-C")
    parser.add_argument("--port", type=inputs.port, default=0, help="of the endpoint (default: a free one)")
    parser.add_argument(
        "--directory", default="build/demo", metavar="DIR", help="plans, logs and report go here"
    )
    output.add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from hexgen2.report import print_plan, save_picture

    start = time.monotonic()
    log = output.progress_console()
    # With --json stdout is for the report alone.
    console = log if args.json else output.result_console()
    directory = Path(args.directory)

    console.rule("1. Llama-2-70B on 20 unlike GPUs: the plan", align="left")
    mixed = plan_example(MIXED_CLUSTER, "llama-2-70b", "hphd")
    print_plan(console, mixed)
    output.write_json(directory / "mixed.json", mixed.document())
    save_picture(mixed, directory / "mixed.svg")
    console.print(f"saved: {directory / 'mixed.json'}, picture {directory / 'mixed.svg'}\n")

    console.rule("2. The tiny model on this machine: the plan", align="left")
    local = plan_example(LOCAL_CLUSTER, "tiny-llama", LOCAL_WORKLOAD)
    print_plan(console, local)
    output.write_json(directory / "local.json", local.document())
    if not local.role_groups("prefill") or len(local.role_groups("decode")) < 2:
        raise RuntimeError("the local plan has no prefill group with two decode groups to show")

    console.print()
    console.rule("3. Serving it with real engines", align="left")
    report = asyncio.run(_serve_and_ask(local, directory, args, console, log))
    report["seconds"] = round(time.monotonic() - start, 1)
    report["plan"] = local.document()
    output.write_json(directory / "report.json", report)
    console.print(f"report: {directory / 'report.json'}")
    if args.json:
        output.print_json(report)
    return 0 if report["failed"] == 0 and report["identical"] and report["kv_bytes"] > 0 else 1


def plan_example(cluster: str, model: str, workload: str) -> Plan:
    """Plan a shipped example with the paper's solver, which always disaggregates.

    The default solver may choose colocated groups, on one machine in particular: there is nothing to gain from
    moving KV caches between engines that share its cores. The demo is to show the transfer.
    """
    from hexgen2.cli.main import build_parser
    from hexgen2.cli.planning import load_problem
    from hexgen2.scheduler import schedule

    path = example_cluster(cluster)
    args = build_parser().parse_args(["plan", "--cluster", str(path), "--model", model, "--workload", workload])
    return schedule(load_problem(args), solver="paper", seed=args.seed, clock=time.monotonic)


def example_cluster(name: str) -> Path:
    """A cluster of the examples folder: inside the installed package, or in the checkout beside it."""
    package = Path(__file__).parents[1]
    for folder in (package / "assets" / "clusters", package.parents[1] / "examples" / "clusters"):
        if (folder / name).exists():
            return folder / name
    raise InputError(name, "", "this example is not installed", "run the demo from a checkout")


async def _serve_and_ask(
    plan: Plan, directory: Path, args: argparse.Namespace, console: Console, log: Console
) -> dict[str, Any]:
    from hexgen2.cli.serving import Options, serving
    from hexgen2.report.results import seconds_words
    from hexgen2.specs.results import percentiles

    options = Options(port=args.port, run_directory=directory / "engines")
    async with serving(plan, options, log) as served:
        console.print(f"endpoint {served.url}, asking {len(QUESTIONS) + len(OPENINGS)} prompts")
        answers, errors = await _ask(served.url)
        kv_bytes = await served.kv_bytes()
        _print_answers(console, answers)
        if args.keep:
            console.print(f"serving at {served.url}/v1, model tiny-llama; Ctrl-C ends it")
            await served.until_interrupted()

    console.print("\nthe same prompts to one colocated engine, to compare the answers")
    alone = Options(port=0, run_directory=directory / "reference")
    async with serving(colocated_plan(plan), alone, log) as served:
        reference, reference_errors = await _ask(served.url)
    errors += reference_errors
    wanted = {(answer.prompt, answer.chat): answer.text for answer in reference}
    same = sum(wanted.get((answer.prompt, answer.chat)) == answer.text for answer in answers)
    identical = same == len(answers) == len(QUESTIONS) + len(OPENINGS)

    first = answers[0]
    console.print(f"\n{first.prompt}", style="bold")
    console.print(f"{first.text}\n")
    ttft = percentiles(_numbers([answer.ttft_s for answer in answers]))
    tpot = percentiles(_numbers([answer.tpot_s for answer in answers]))
    console.print(
        f"{len(answers)} answered, {len(errors)} failed; {same} equal to the colocated engine's; "
        f"{kv_bytes / 2**20:.2f} MiB of KV cache moved; TTFT P50 {seconds_words(ttft['p50'])}, "
        f"TPOT P50 {seconds_words(tpot['p50'])}"
    )
    for error in errors[:5]:
        console.print(f"failed: {error}")
    return {
        "requests": len(QUESTIONS) + len(OPENINGS),
        "failed": len(errors),
        "identical": identical,
        "kv_bytes": kv_bytes,
        "ttft_s": ttft,
        "tpot_s": tpot,
        "first_answer": {"prompt": first.prompt, "text": first.text},
    }


def colocated_plan(plan: Plan) -> Plan:
    """One colocated group on the plan's first GPU: the reference for its answers."""
    first = plan.groups[0]
    stage = first.stages[0].model_copy(update={"gpus": first.gpus[:1], "tp": 1, "first_layer": 0})
    layers = sum(stage.layers for stage in first.stages)
    group = first.model_copy(
        update={
            "id": "c0",
            "role": "colocated",
            "share": 1.0,
            "stages": (stage.model_copy(update={"layers": layers}),),
        }
    )
    return plan.model_copy(update={"groups": (group,), "routes": ()})


async def _ask(url: str) -> tuple[list[Answer], list[str]]:
    """Every prompt through the official client, half of them streamed, six at a time."""
    from openai import AsyncOpenAI

    gate = asyncio.Semaphore(6)
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as client:

        async def one(place: int, prompt: str, chat: bool) -> Answer:
            async with gate:
                return await _answer(client, prompt, chat, streamed=place % 2 == 0)

        prompts = [(prompt, True) for prompt in QUESTIONS] + [(prompt, False) for prompt in OPENINGS]
        results = await asyncio.gather(
            *(one(place, prompt, chat) for place, (prompt, chat) in enumerate(prompts)), return_exceptions=True
        )
    answers = [result for result in results if isinstance(result, Answer)]
    errors = [f"{type(result).__name__}: {result}" for result in results if isinstance(result, Exception)]
    if not answers:
        raise RuntimeError(f"no prompt was answered: {errors[0]}")
    return answers, errors


async def _answer(client: Any, prompt: str, chat: bool, streamed: bool) -> Answer:
    fields: dict[str, Any] = {"model": "tiny-llama", "max_tokens": MAX_TOKENS, "temperature": 0}
    if chat:
        create, fields["messages"] = client.chat.completions.create, [{"role": "user", "content": prompt}]
    else:
        create, fields["prompt"] = client.completions.create, prompt
    start = time.perf_counter()
    if not streamed:
        done = await create(**fields)
        choice = done.choices[0]
        text = choice.message.content if chat else choice.text
        return Answer(
            prompt, chat, False, text, done.usage.completion_tokens, None, time.perf_counter() - start
        )
    text, tokens, first = "", 0, None
    async for chunk in await create(**fields, stream=True, stream_options={"include_usage": True}):
        if chunk.usage:
            tokens = chunk.usage.completion_tokens
        for choice in chunk.choices:
            piece = choice.delta.content if chat else choice.text
            if piece:
                first = first or time.perf_counter() - start
                text += piece
    return Answer(prompt, chat, True, text, tokens, first, time.perf_counter() - start)


def _print_answers(console: Console, answers: Sequence[Answer]) -> None:
    from rich.table import Table

    from hexgen2.report.results import seconds_words

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("prompt", max_width=27, no_wrap=True, overflow="ellipsis")
    table.add_column("answer", max_width=60, no_wrap=True, overflow="ellipsis")
    for heading in ("tokens", "TTFT", "TPOT", "E2E"):
        table.add_column(heading, justify="right", no_wrap=True, min_width=6)
    for answer in answers:
        figures = (seconds_words(answer.ttft_s), seconds_words(answer.tpot_s), seconds_words(answer.e2e_s))
        table.add_row(answer.prompt, " ".join(answer.text.split()), str(answer.tokens), *figures)
    console.print(table)


def _numbers(values: Sequence[float | None]) -> Any:
    import numpy as np

    return np.array([value for value in values if value is not None], dtype=float)
