"""The one error type that a user's mistake raises."""

from __future__ import annotations

from pydantic import ValidationError


class InputError(ValueError):
    """A user's mistake, told in one line: where, which field, what is wrong with the value, how to mend it.

    The CLI prints ``str(error)`` and leaves with exit code 2; nothing else may do so for bad input.
    """

    def __init__(self, source: str, field: str, problem: str, mend: str) -> None:
        self.source = source
        self.field = field
        self.problem = problem
        self.mend = mend
        place = f"{source}: {field}" if field else source
        super().__init__(" ".join(f"{place}: {problem}; {mend}".split()))

    @classmethod
    def from_validation(cls, source: str, error: ValidationError) -> InputError:
        """The first complaint of a pydantic error as an InputError (one line, with the field's path)."""
        first = error.errors(include_url=False)[0]
        field = ""
        for part in first["loc"]:
            field += f"[{part}]" if isinstance(part, int) else f".{part}" if field else str(part)
        message = first["msg"].removeprefix("Value error, ")
        if ";" in message:  # our own validators write "problem; mend"
            problem, mend = message.split(";", 1)
            return cls(source, field, problem.strip(), mend.strip())
        kind = first["type"]
        if kind == "missing":
            return cls(source, field, "is missing", f"add {field!r}")
        if kind == "extra_forbidden":
            return cls(source, field, "is not a known field", "remove it or correct its spelling")
        value = repr(first["input"])
        shown = value if len(value) <= 60 else value[:57] + "..."
        return cls(source, field, f"{shown}: {message[0].lower()}{message[1:]}", "correct the value")
