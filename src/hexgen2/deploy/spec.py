"""What a launcher runs: processes, and the coordinator in front of them. Data only."""

from __future__ import annotations

from pydantic import Field

from hexgen2.coordinator.config import CoordinatorConfig
from hexgen2.specs.base import Spec
from hexgen2.specs.plan import Role


class ProcessSpec(Spec):
    """One operating-system process of a serving group.

    A group on one node is one process; a group that spans nodes is one process per node (or per stage), and
    ``rank`` counts them in stage order. Only rank 0 has an HTTP server, hence ``readiness_url`` is None on
    the others: the group is ready when rank 0 answers.

    ``env`` is added to the launcher's own environment after the variables in ``unset`` are taken out of it.
    ``gpus`` are the plan's names, in rank order; which devices those are on the host is already in ``env``.
    ``ports`` are what the process listens on, by purpose, all on ``host``.
    """

    name: str = Field(min_length=1)
    group_id: str
    role: Role
    rank: int = Field(ge=0)
    node: str
    host: str
    argv: tuple[str, ...] = Field(min_length=1)
    env: dict[str, str]
    unset: tuple[str, ...] = ()
    gpus: tuple[str, ...] = Field(min_length=1)
    ports: dict[str, int]
    readiness_url: str | None
    log_name: str


class Deployment(Spec):
    """A plan as processes, with what the coordinator must know to use them.

    ``notes`` are decisions that a reader of the plan cannot see in it, in words (which KV connector, and
    why).
    """

    processes: tuple[ProcessSpec, ...] = Field(min_length=1)
    coordinator: CoordinatorConfig
    notes: tuple[str, ...] = ()

    def group(self, group_id: str) -> tuple[ProcessSpec, ...]:
        """The processes of a group in rank order."""
        return tuple(process for process in self.processes if process.group_id == group_id)
