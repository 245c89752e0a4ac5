"""``hexgen2``: parse, run the command, turn what went wrong into an exit code.

0 done, 2 a user's mistake (one line on stderr), 1 anything else.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from hexgen2 import __version__
from hexgen2.cli import commands
from hexgen2.specs.errors import InputError


class Parser(argparse.ArgumentParser):
    """argparse, but a wrong argument is one line, as every other mistake of a user."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}; see `{self.prog} --help`", file=sys.stderr)
        raise SystemExit(2)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="hexgen2", description="Plan and run disaggregated LLM serving over unlike GPUs.")
    parser.add_argument("--version", action="version", version=f"hexgen2 {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for command in commands():
        command.add_parser(subparsers)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(arguments)
    try:
        return int(args.run(args))
    except InputError as error:
        print(f"hexgen2 {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"hexgen2 {args.command}: interrupted", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of our output went away (`| head`)
        sys.stderr.close()
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
