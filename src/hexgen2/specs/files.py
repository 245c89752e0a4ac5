"""Reading the user's YAML and JSON files, with their mistakes told in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from hexgen2.specs.errors import InputError


def read_text(path: str | Path, what: str) -> str:
    """The text of a file; ``what`` names the kind of file in the message when it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(str(path), "", "no such file", f"give the path of a {what}") from None
    except IsADirectoryError:
        raise InputError(str(path), "", "is a directory", f"give the path of a {what}") from None
    except PermissionError:
        raise InputError(str(path), "", "cannot be read", "allow reading it") from None
    except OSError as error:
        raise InputError(
            str(path), "", f"cannot be read ({error.strerror})", f"give the path of a {what}"
        ) from None
    except UnicodeDecodeError:
        raise InputError(str(path), "", "is not UTF-8 text", f"give the path of a {what}") from None


def read_mapping(path: str | Path, what: str) -> dict[str, Any]:
    """A YAML file whose top level is a mapping."""
    text = read_text(path, what)
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "is not valid YAML"
        raise InputError(str(path), where, str(problem), "mend the YAML there") from None
    except (ValueError, RecursionError):  # a number of thousands of digits, a date that is none
        raise InputError(str(path), "", "is no YAML that can be read", "mend the file") from None
    return require_mapping(document, str(path), what)


def read_json(path: str | Path, what: str) -> dict[str, Any]:
    """A JSON file whose top level is an object."""
    text = read_text(path, what)
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(
            str(path), f"line {error.lineno}", f"is not whole JSON ({error.msg})", "write the file again"
        ) from None
    except (ValueError, RecursionError):  # a number of thousands of digits, thousands of brackets
        raise InputError(str(path), "", "is no JSON that can be read", "write the file again") from None
    return require_mapping(document, str(path), what)


def require_mapping(document: object, source: str, what: str) -> dict[str, Any]:
    """``document`` if it is a mapping with text keys, else an InputError."""
    if not isinstance(document, dict) or not all(isinstance(key, str) for key in document):
        if document is None:
            found = "is empty"
        elif isinstance(document, dict):
            found = "has a key that is not text"
        else:
            found = f"holds a {type(document).__name__}, not a mapping"
        raise InputError(source, "", found, f"write a {what}: see the examples folder")
    return document
