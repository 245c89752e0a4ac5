"""The tunings by name: what each relies on, which ones a value of `HEXGEN2_VLLM_TUNING` asks for, and
applying them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from hexgen2.vllm_plugin import (
    compat,
    idle_wait,
    nixl_affinity,
    nixl_progress,
    parent_death,
    pipeline_buffers,
    start_method,
    ucx_settings,
)
from hexgen2.vllm_plugin.compat import Reliance

# A child of vLLM's logger. Lines are warnings, since vLLM loads plugins before it sets up its own logging and
# anything less would be lost then.
logger = logging.getLogger("vllm.hexgen2")


@dataclass(frozen=True)
class Tuning:
    """One change to vLLM: its name, what it relies on, and the function that makes it."""

    name: str
    relies_on: tuple[Reliance, ...]
    install: Callable[[], None]


TUNINGS = (
    Tuning("fork", start_method.RELIES_ON, start_method.install),
    Tuning("nixl-progress", nixl_progress.RELIES_ON, nixl_progress.install),
    Tuning("nixl-affinity", nixl_affinity.RELIES_ON, nixl_affinity.install),
    Tuning("idle-wait", idle_wait.RELIES_ON, idle_wait.install),
    Tuning("pipeline-buffers", pipeline_buffers.RELIES_ON, pipeline_buffers.install),
    Tuning("parent-death", parent_death.RELIES_ON, parent_death.install),
    Tuning("ucx-settings", ucx_settings.RELIES_ON, ucx_settings.install),
)

_applied: set[str] = set()


def select(wanted: str) -> tuple[tuple[Tuning, ...], tuple[str, ...]]:
    """The tunings that a value of the variable asks for, in their fixed order, and the words that name none.

    The value is `cpu` for all of them, or a comma-separated list of names.

    >>> [tuning.name for tuning in select("fork,nixl-progress")[0]]
    ['fork', 'nixl-progress']
    """
    words = {word.strip() for word in wanted.split(",")} - {""}
    chosen = tuple(tuning for tuning in TUNINGS if "cpu" in words or tuning.name in words)
    unknown = words - {"cpu"} - {tuning.name for tuning in TUNINGS}
    return chosen, tuple(sorted(unknown))


def apply(wanted: str) -> None:
    """Install those of the tunings asked for that fit this vLLM, each once a process; a log line for the
    rest."""
    chosen, unknown = select(wanted)
    for word in unknown:
        known = ", ".join(tuning.name for tuning in TUNINGS)
        logger.warning("hexgen2: there is no tuning %r; use cpu for all, or some of %s", word, known)
    fresh = [tuning for tuning in chosen if tuning.name not in _applied]
    _applied.update(tuning.name for tuning in fresh)
    if not fresh:
        return
    if problem := compat.version_problem():
        logger.warning("hexgen2: this vLLM is left as it is, since %s", problem)
        return
    installed = []
    for tuning in fresh:
        problem = next(filter(None, (reliance.problem() for reliance in tuning.relies_on)), None)
        if problem:
            logger.warning("hexgen2: tuning %s is left out, since %s", tuning.name, problem)
            continue
        tuning.install()
        installed.append(tuning.name)
    if installed:
        logger.warning("hexgen2: this vLLM is tuned: %s", ", ".join(installed))
