"""`python -m hexgen2.coordinator --config FILE --host H --port P`: the coordinator as its own process."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from pathlib import Path

from hexgen2.coordinator import logs
from hexgen2.coordinator.auth import ApiKeys
from hexgen2.coordinator.config import CoordinatorConfig
from hexgen2.coordinator.errors import WorkersFailed
from hexgen2.coordinator.loop import run
from hexgen2.coordinator.service import Coordinator
from hexgen2.coordinator.tls import Tls
from hexgen2.coordinator.tracing import Tracing
from hexgen2.specs.errors import InputError


async def _serve(coordinator: Coordinator, host: str, port: int) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, coordinator.reload)
    async with coordinator.running(host, port):
        print(f"coordinator on {coordinator.url}", file=sys.stderr, flush=True)
        await stop.wait()
        print("shutting down: running requests may finish", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT. Exit codes: 0 stopped, 1 a worker does not come up, 2 bad input."""
    parser = argparse.ArgumentParser(prog="python -m hexgen2.coordinator", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="a coordinator config (JSON)")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--api-key-file", type=Path, help="one key a line; without it everyone may ask")
    parser.add_argument("--tls-cert", type=Path, help="PEM certificate (chain): serve HTTPS")
    parser.add_argument("--tls-key", type=Path, help="its key")
    parser.add_argument("--otlp-traces-endpoint", metavar="URL", help="send OpenTelemetry traces there")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes that serve")
    parser.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    parser.add_argument("--log-json", action="store_true", help="logs as JSON lines")
    arguments = parser.parse_args(argv)
    logs.configure(arguments.log_level, arguments.log_json)
    try:
        config = CoordinatorConfig.load(arguments.config)
        keys = ApiKeys.from_file(arguments.api_key_file) if arguments.api_key_file else None
        tls = Tls.from_options(arguments.tls_cert, arguments.tls_key)
        tracing = Tracing.to_endpoint(arguments.otlp_traces_endpoint)
        if not 0 <= arguments.port < 2**16:
            raise InputError("--port", "", f"{arguments.port} is no port", "give 0 to 65535")
        if arguments.workers < 1:
            raise InputError("--workers", "", f"{arguments.workers} processes cannot serve", "give 1 or more")
        coordinator = Coordinator(config, keys, tls, tracing, arguments.workers)
        run(_serve(coordinator, arguments.host, arguments.port))
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    except WorkersFailed as failure:
        print(failure, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
