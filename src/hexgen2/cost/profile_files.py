"""Profiles from files, and those that are shipped."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from hexgen2.cost.profile import Efficiencies, Profile, parse_profile
from hexgen2.specs.errors import InputError
from hexgen2.specs.files import read_mapping


def load_efficiencies(names: Sequence[str]) -> Efficiencies:
    """The efficiencies of the named profiles, over the defaults."""
    return Efficiencies([load_profile(name) for name in names])


def load_profile(name: str) -> Profile:
    """A profile from a file, or a shipped one by its name."""
    if Path(name).is_file():
        return parse_profile(read_mapping(name, "profile file"), name)
    shipped = {
        entry.name.removesuffix(".yaml"): entry
        for entry in resources.files("hexgen2.cost").joinpath("profiles").iterdir()
        if entry.name.endswith(".yaml")
    }
    if name not in shipped:
        known = f"name one of {', '.join(sorted(shipped))}, or give" if shipped else "give"
        raise InputError(
            "--profile", "", f"there is no profile or file {name!r}", f"{known} the path of a file"
        )
    with resources.as_file(shipped[name]) as path:
        return parse_profile(read_mapping(path, "profile file"), name)


def lasting_name(name: str) -> str:
    """What finds the profile from any folder: a file's whole path, a shipped profile's name."""
    path = Path(name)
    return str(path.resolve()) if path.is_file() else name
