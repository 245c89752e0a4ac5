"""`python -m hexgen2.emulator --role decode --port 8101`: one emulated engine as a process."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys

from hexgen2.emulator import EmulatedEngine, EmulatorConfig, Fault, LinearTiming
from hexgen2.emulator.faults import FAULT_KINDS


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m hexgen2.emulator", description=__doc__)
    parser.add_argument("--role", choices=("prefill", "decode", "colocated"), default="colocated")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--served-model-name", nargs="+", default=["emulated"])
    parser.add_argument("--max-batch", type=int, default=256, help="sequences that run at once")
    parser.add_argument("--max-model-len", type=int, default=131_072)
    parser.add_argument("--kv-bytes-per-token", type=int, default=4096)
    parser.add_argument("--kv-tokens", type=int, default=1 << 20, help="size of the KV cache, for /metrics")
    parser.add_argument("--kv-lease-s", type=float, default=30.0)
    timing = parser.add_argument_group("timing, in seconds")
    timing.add_argument("--prefill-base-s", type=float, default=0.001)
    timing.add_argument("--prefill-per-token-s", type=float, default=0.0)
    timing.add_argument("--step-base-s", type=float, default=0.001)
    timing.add_argument("--step-per-sequence-s", type=float, default=0.0)
    timing.add_argument("--step-per-context-token-s", type=float, default=0.0)
    timing.add_argument("--kv-per-token-s", type=float, default=0.0)
    faults = parser.add_argument_group("faults, for tests only")
    faults.add_argument("--fault", choices=FAULT_KINDS)
    faults.add_argument("--fault-after-tokens", type=int, default=0)
    faults.add_argument("--fault-times", type=int, help="how many requests it hits; all where not given")
    return parser.parse_args(argv)


async def _serve(arguments: argparse.Namespace) -> int:
    timing = LinearTiming(
        prefill_base_s=arguments.prefill_base_s,
        prefill_per_token_s=arguments.prefill_per_token_s,
        step_base_s=arguments.step_base_s,
        step_per_sequence_s=arguments.step_per_sequence_s,
        step_per_context_token_s=arguments.step_per_context_token_s,
        kv_per_token_s=arguments.kv_per_token_s,
    )
    config = EmulatorConfig(
        model_names=tuple(arguments.served_model_name),
        role=arguments.role,
        timing=timing,
        max_batch=arguments.max_batch,
        max_model_len=arguments.max_model_len,
        kv_bytes_per_token=arguments.kv_bytes_per_token,
        kv_tokens=arguments.kv_tokens,
        lease_s=arguments.kv_lease_s,
    )
    fault = None
    if arguments.fault:
        fault = Fault(arguments.fault, arguments.fault_after_tokens, arguments.fault_times)
    engine = EmulatedEngine(config, fault)
    engine.on_die = lambda: os._exit(1)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    try:
        await engine.start(arguments.port, arguments.host)
    except OSError as error:
        print(f"port {arguments.port}: {error.strerror or error}; give a free one", file=sys.stderr)
        return 2
    print(f"emulated {arguments.role} engine on {engine.url}", file=sys.stderr, flush=True)
    await stop.wait()
    await engine.stop()
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run until SIGTERM or SIGINT; exit code 2 where the port is taken."""
    return asyncio.run(_serve(_arguments(argv)))


if __name__ == "__main__":
    sys.exit(main())
