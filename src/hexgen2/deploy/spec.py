"""What a launcher runs: processes, and the coordinator in front of them. Data only."""

from __future__ import annotations

import json

from pydantic import Field

from hexgen2.coordinator.config import CoordinatorConfig
from hexgen2.specs.base import Spec
from hexgen2.specs.plan import Role

KV_TRANSFER_FLAG = "--kv-transfer-config"


class ProcessSpec(Spec):
    """One operating-system process of a serving group.

    A group on one node is one process; a group that spans nodes is one process per node (or per stage), and
    ``rank`` counts them in stage order. Only rank 0 has an HTTP server, hence ``readiness_url`` is None on
    the others: the group is ready when rank 0 answers.

    ``env`` is added to the launcher's own environment after the variables in ``unset`` are taken out of it.
    ``gpus`` are the plan's names, in rank order; which devices those are on the host is already in ``env``.
    ``ports`` are what the process listens on, by purpose, all on ``host``. ``files`` are texts that it reads,
    by their names in its working directory.
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
    files: dict[str, str] = Field(default_factory=dict)

    def again(self, times: int) -> ProcessSpec:
        """The process as it is started for the ``times``-th time again: with a KV identity that no peer knows
        yet, and a log of its own.

        Peers remember the memory layout of the engines they have met by their identity (vLLM's `engine_id`). A
        new process under an old name would be read and written at the addresses of the old one's memory.
        """
        argv = list(self.argv)
        if KV_TRANSFER_FLAG in argv:
            place = argv.index(KV_TRANSFER_FLAG) + 1
            config = json.loads(argv[place])
            if "engine_id" in config:
                config["engine_id"] += f"-{times}"
                argv[place] = json.dumps(config)
        stem, dot, suffix = self.log_name.rpartition(".")
        log_name = f"{stem}.again{times}{dot}{suffix}" if dot else f"{self.log_name}.again{times}"
        return self.model_copy(update={"argv": tuple(argv), "log_name": log_name})


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
