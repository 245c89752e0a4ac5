"""The OpenAI-compatible server of a group with a layout.

    python -m hexgen2.vllm_plugin.asymmetric.server --layout 2x5+1x3 --model MODEL [vLLM's arguments]

On several nodes the same command runs once on each, with `--node-rank`, `--master-addr` and `--master-port`
(and the next port) as in vLLM; the number of nodes is the layout's. Node 0 serves; the others run their ranks
until the group ends. Exit code 0 after an orderly end, 2 for a mistake in the arguments (one line), 1 for
anything else.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from hexgen2.specs.errors import InputError
from hexgen2.vllm_plugin.asymmetric.layout import LAYOUT_KEY, Layout
from hexgen2.vllm_plugin.asymmetric.reliance import require_vllm

HTTP_GRACE_S = 5
"""How long open connections may keep the server once its engine has ended: no answer can come any more."""

OWNED = {
    "tensor_parallel_size": "--tensor-parallel-size",
    "pipeline_parallel_size": "--pipeline-parallel-size",
    "nnodes": "--nnodes",
    "distributed_executor_backend": "--distributed-executor-backend",
}
"""vLLM's arguments that the layout sets."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Start the server or a follower; returns the exit code."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(
        "--layout", required=True, help="stages as TPxLAYERS[@NODE]+..., as JSON, or @FILE with JSON"
    )
    own, rest = parser.parse_known_args(sys.argv[1:] if arguments is None else arguments)
    try:
        require_vllm()
        layout = _read_layout(own.layout)
        args = _vllm_arguments(rest)
        if not 0 <= args.node_rank < layout.nodes:
            problem = f"is {args.node_rank}, the layout has {layout.nodes} nodes"
            raise InputError("--node-rank", "", problem, f"give 0 to {layout.nodes - 1}")
        if args.node_rank == 0:
            return _serve(layout, args)
        _follow(layout, args)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2


def _read_layout(text: str) -> Layout:
    if not text.startswith("@"):
        return Layout.parse(text, "--layout")
    try:
        return Layout.parse(Path(text[1:]).read_text(), f"--layout {text}")
    except OSError as error:
        raise InputError(
            "--layout", text, f"cannot be read ({error.strerror})", "name a readable file"
        ) from None


def _vllm_arguments(rest: Sequence[str]) -> argparse.Namespace:
    """vLLM's own arguments, checked by vLLM's own parser."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    parser = make_arg_parser(FlexibleArgumentParser(prog="python -m hexgen2.vllm_plugin.asymmetric.server"))
    args: argparse.Namespace = parser.parse_args(list(rest))
    configure_logging_from_args(args)
    validate_parsed_serve_args(args)
    for name, option in OWNED.items():
        if getattr(args, name) != parser.get_default(name):
            raise InputError(option, "", "contradicts --layout, which sets it", "leave it out")
    if getattr(args, "model_tag", None):
        args.model = args.model_tag
    return args


def _engine_arguments(layout: Layout, args: argparse.Namespace) -> Any:
    """vLLM's engine arguments with a configuration that follows the layout."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform

    from hexgen2.vllm_plugin.asymmetric.config import apply_layout, choose_devices
    from hexgen2.vllm_plugin.asymmetric.executor import AsymmetricExecutor
    from hexgen2.vllm_plugin.asymmetric.refusals import check_config

    class LayoutEngineArgs(AsyncEngineArgs):  # type: ignore[misc]
        def create_engine_config(self, usage_context: Any = None, headless: bool = False) -> Any:
            config = super().create_engine_config(usage_context, headless)
            check_config(config, layout)
            apply_layout(config, layout)
            return config

    if current_platform.is_cuda_alike():
        choose_devices(layout, args.node_rank, current_platform.device_control_env_var)
    elif current_platform.is_cpu():
        os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")  # it runs no pipelines on CPU
    args.pipeline_parallel_size = len(layout.stages)
    args.distributed_executor_backend = AsymmetricExecutor
    args.additional_config = {**(args.additional_config or {}), LAYOUT_KEY: layout.document()}
    return LayoutEngineArgs.from_cli_args(args)


def _serve(layout: Layout, args: argparse.Namespace) -> int:
    import uvloop

    alive = uvloop.run(_serve_http(_engine_arguments(layout, args), args))
    return 0 if alive else 1


async def _serve_http(engine_args: Any, args: argparse.Namespace) -> bool:
    """vLLM's own server, over an engine with our configuration.

    Returns whether the engine was alive when the server was stopped; vLLM itself ends alike in both cases.
    """
    from vllm.entrypoints.launchers.api_server import entry
    from vllm.entrypoints.launchers.cli_args import propagate_flash_late_interaction
    from vllm.entrypoints.launchers.launcher import setup_server
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    def interrupt(*_: Any) -> None:  # until uvicorn sets its own handlers
        raise KeyboardInterrupt("terminated")

    signal.signal(signal.SIGTERM, interrupt)
    listen_address, sock = setup_server(args, reuse_port=False)
    if args.tool_parser_plugin:
        ToolParserManager.import_tool_parser(args.tool_parser_plugin)
    if args.reasoning_parser_plugin:
        ReasoningParserManager.import_reasoning_parser(args.reasoning_parser_plugin)
    propagate_flash_late_interaction(args, engine_args)
    try:
        async with entry.build_async_engine_client_from_engine_args(engine_args) as client:
            alive = _note_life(client)
            shutdown = await entry.build_and_serve(
                client, listen_address, sock, args, timeout_graceful_shutdown=HTTP_GRACE_S
            )
        await shutdown
    finally:
        sock.close()
    return any(alive)


def _note_life(client: Any) -> list[bool]:
    """A list that gets one entry at each call of the client's `shutdown`: whether its engine was alive then."""
    notes: list[bool] = []
    shutdown = client.shutdown

    def noting(timeout: float | None = None) -> None:
        notes.append(not client.errored)
        shutdown(timeout=timeout)

    client.shutdown = noting
    return notes


def _follow(layout: Layout, args: argparse.Namespace) -> NoReturn:
    from vllm.usage.usage_lib import UsageContext

    from hexgen2.vllm_plugin.asymmetric.executor import AsymmetricExecutor

    def stop(*_: Any) -> None:
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    config = _engine_arguments(layout, args).create_engine_config(UsageContext.OPENAI_API_SERVER, headless=True)
    try:
        executor = AsymmetricExecutor(config, monitor_workers=False)
    except ConnectionError as error:
        raise InputError("--master-addr", "", str(error), "start all nodes with one layout") from None
    code = 1
    try:
        executor.start_worker_monitor(inline=True)  # returns once the workers end
        code = 0 if executor.lifeline is not None and executor.lifeline.orderly else 1
    except SystemExit:
        code = 0
    except Exception:
        traceback.print_exc()
    finally:
        executor.shutdown()
        sys.stdout.flush()
        # The workers are gone and nothing is left to save; an interpreter's full end may wait for queues
        # of ranks that no longer answer.
        os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
