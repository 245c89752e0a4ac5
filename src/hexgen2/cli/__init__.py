"""The command line: one file a command, each with `add_parser` and `run`.

A command's module is light to import: what it needs (solvers, plotting, servers) is imported when it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType


def commands() -> Sequence[ModuleType]:
    """The command modules, in the order of a user's path."""
    from hexgen2.cli import (
        bench,
        budget,
        calibrate,
        demo,
        estimate,
        explain,
        export,
        plan,
        probe,
        serve,
        simulate,
        top,
    )

    return (probe, calibrate, budget, plan, explain, estimate, simulate, serve, top, export, bench, demo)
