"""Which vLLM the plugin knows, and the check that what a tuning relies on is there.

The tunings replace private functions, which vLLM may change in any release. So each one names what it
touches, and is left out, with one clear log line, where the version or a signature is not the one it was
written for.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass

KNOWN_VERSIONS = ("0.32.0",)


@dataclass(frozen=True)
class Reliance:
    """Something of vLLM (or NIXL) that a tuning relies on.

    `parameters` are the names of the function's parameters, in order, or None for a thing that is not a
    function.
    """

    module: str
    attribute: str
    parameters: tuple[str, ...] | None = None

    def problem(self) -> str | None:
        """What does not fit, in words; None where all does."""
        try:
            found: object = importlib.import_module(self.module)
        except ImportError as error:
            return f"{self.module} cannot be imported ({error})"
        for part in self.attribute.split("."):
            # A classmethod is looked up on its class, hence getattr and not vars().
            found = getattr(found, part, None)
            if found is None:
                return f"{self.module} has no {self.attribute}"
        if self.parameters is None:
            return None
        if not callable(found):
            return f"{self.module}.{self.attribute} is not callable"
        names = tuple(inspect.signature(found).parameters)
        if names != self.parameters:
            return (
                f"{self.module}.{self.attribute} takes ({', '.join(names)}), not ({', '.join(self.parameters)})"
            )
        return None


def base_version(version: str) -> str:
    """A version without its local part: `0.32.0+cpu` -> `0.32.0`."""
    return version.split("+", 1)[0]


def version_problem() -> str | None:
    """Why the installed vLLM is not one that the plugin knows; None where it is."""
    from vllm import __version__

    if base_version(__version__) in KNOWN_VERSIONS:
        return None
    return f"vLLM {__version__} is not one of the versions it knows ({', '.join(KNOWN_VERSIONS)})"
