"""Arguments that several commands share, and the values that they name."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable


def positive(text: str) -> float:
    """A number above zero (argparse type)."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"{text} is not above zero")
    return value


def count(text: str) -> int:
    """A whole number of at least one (argparse type)."""
    return _whole(text, 1)


def count_or_none(text: str) -> int:
    """A whole number, 0 included (argparse type)."""
    return _whole(text, 0)


def count_up_to(most: int) -> Callable[[str], int]:
    """A whole number from one to ``most`` (argparse type)."""

    def read(text: str) -> int:
        value = count(text)
        if value > most:
            raise argparse.ArgumentTypeError(f"{text[:20]} is more than {most:,}")
        return value

    return read


def _whole(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if value < least:
        raise argparse.ArgumentTypeError(f"{text} is not at least {least}")
    return value


def port(text: str) -> int:
    """A TCP port, 0 for any free one (argparse type)."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port") from None
    if not 0 <= value <= 65535:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 65535")
    return value


def service(url: str) -> str:
    """The address of a service, from what clients call it: they add `/v1`.

    >>> service("http://127.0.0.1:8000/v1/")
    'http://127.0.0.1:8000'
    """
    return url.rstrip("/").removesuffix("/v1")


def add_api_key(parser: argparse.ArgumentParser) -> None:
    """A key in the environment does not show among the processes of the machine."""
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        default=os.environ.get("HEXGEN2_API_KEY"),
        help="where the service asks for one ($HEXGEN2_API_KEY)",
    )


def add_model_and_workload(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, metavar="NAME|DIR", help="model name, or directory with config.json"
    )
    parser.add_argument(
        "--workload", required=True, metavar="NAME|FILE", help="workload name, CSV, JSONL or fixed:I/O"
    )


def add_engine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--engine", choices=("any", "vllm", "vllm-asymmetric"), default="vllm")


def add_profiles(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--profile",
        action="append",
        default=[],
        metavar="FILE|NAME",
        help="measured efficiencies of GPU types (a plan's own where it was made with some); "
        "may be given several times, the last that knows a type wins",
    )


def add_slo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--slo-ttft", type=positive, metavar="S", help="target for the time to first token, seconds"
    )
    parser.add_argument(
        "--slo-tpot", type=positive, metavar="S", help="target for the time per output token, seconds"
    )
