"""The one error type that a user's mistake raises."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import ValidationError

# What is wrong with a value and how to mend it, by the kind of pydantic's complaint; `{gt}` and the like are of
# its context.
_COMPLAINTS: Mapping[str, tuple[str, str]] = {
    "greater_than": ("is not greater than {gt:g}", "give a number greater than {gt:g}"),
    "greater_than_equal": ("is less than {ge:g}", "give a number of at least {ge:g}"),
    "less_than_equal": ("is more than {le:g}", "give a number of at most {le:g}"),
    "finite_number": ("is not finite", "give a finite number"),
    "int_type": ("is not a whole number", "write a whole number"),
    "int_parsing": ("is not a whole number", "write a whole number"),
    "int_from_float": ("is not a whole number", "write a whole number"),
    "float_type": ("is not a number", "write a number"),
    "float_parsing": ("is not a number", "write a number"),
    "string_type": ("is not text", "put it in quotes"),
    "string_too_short": ("is empty", "give it a value"),
    "literal_error": ("is not known", "use {expected}"),
    "tuple_type": ("is not a list", "write a list"),
    "too_short": ("has too few entries", "give at least {min_length}"),
    "too_long": ("has too many entries", "give at most {max_length}"),
    "bool_type": ("is not true or false", "write true or false"),
    "bool_parsing": ("is not true or false", "write true or false"),
    "model_type": ("is not a mapping", "write its fields as KEY: VALUE"),
    "dict_type": ("is not a mapping", "write its fields as KEY: VALUE"),
}


def shown(value: object) -> str:
    """A value as messages show it: long ones are cut.

    >>> shown("a" * 100)
    "'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa..."
    """
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


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

    def __reduce__(self) -> tuple[type[InputError], tuple[str, str, str, str]]:
        """How it travels between processes: exceptions are made anew from their ``args`` otherwise."""
        return type(self), (self.source, self.field, self.problem, self.mend)

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
        if first["input"] is None:
            return cls(source, field, "is empty", "give it a value or leave it out")
        value = shown(first["input"])
        if kind in _COMPLAINTS:
            problem, mend = (text.format(**first.get("ctx", {})) for text in _COMPLAINTS[kind])
            return cls(source, field, f"{value} {problem}", mend)
        return cls(source, field, f"{value}: {message[0].lower()}{message[1:]}", "correct the value")
