"""A plan as files that somebody else runs: Kubernetes manifests, Compose files, shell scripts.

Pure: a plan, a model and settings give texts. The processes are those of `compile_plan`, with the same
arguments and variables as under `serve`; only what a process sees around itself (addresses, device numbers) is
the target's own, through its `Site`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

from hexgen2.deploy.export import compose, kubernetes, shell
from hexgen2.deploy.export.files import Export, File
from hexgen2.deploy.export.settings import ExportSettings
from hexgen2.specs.model import Model
from hexgen2.specs.plan import Plan

__all__ = ["TARGETS", "Export", "ExportSettings", "File", "Target", "export_plan"]

Target = Literal["kubernetes", "compose", "shell"]

TARGETS: Mapping[Target, Callable[[Plan, Model, ExportSettings, str], Export]] = {
    "kubernetes": kubernetes.export,
    "compose": compose.export,
    "shell": shell.export,
}


def export_plan(
    plan: Plan, model: Model, target: Target, settings: ExportSettings | None = None, source: str = "plan"
) -> Export:
    """The files that run ``plan`` on ``target``; InputError where vLLM cannot run the plan."""
    return TARGETS[target](plan, model, settings or ExportSettings(), source)
