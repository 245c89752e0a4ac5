"""What a solver is asked: the cluster, the model behind its cost model, the load and the objective."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from hexgen2.cost.goodput import DEFAULT_TPOT_S, DEFAULT_TTFT_S, Targets
from hexgen2.cost.replica import CostModel
from hexgen2.scheduler.engines import EngineProfile
from hexgen2.specs.cluster import Cluster
from hexgen2.specs.model import Model
from hexgen2.specs.plan import Init, Slo
from hexgen2.specs.workload import Lengths

ObjectiveName = Literal["throughput", "goodput"]


@dataclass(frozen=True)
class Problem:
    """One scheduling problem; equal problems, solvers and seeds give equal plans.

    ``workload`` is the name that the plan repeats, ``lengths`` its representative requests. ``model_name`` and
    ``source`` are what the user typed, for the plan and for messages. ``rate`` (requests/s) is the load to be
    served when the objective counts queueing; None asks for the highest.
    """

    cluster: Cluster
    workload: str
    lengths: Lengths
    cost: CostModel
    engine: EngineProfile
    objective: ObjectiveName = "throughput"
    slo: Slo = field(default_factory=Slo)
    rate: float | None = None
    init: Init = "spectral"
    model_name: str = ""
    source: str = ""
    profiles: tuple[str, ...] = ()

    @property
    def model(self) -> Model:
        return self.cost.model

    @property
    def targets(self) -> Targets | None:
        """The latency targets that goodput counts, defaults where none are given; None for throughput."""
        if self.objective != "goodput":
            return None
        return Targets(self.slo.ttft_s or DEFAULT_TTFT_S, self.slo.tpot_s or DEFAULT_TPOT_S)

    @property
    def place(self) -> str:
        """What messages call the cluster: its file, else its name."""
        return self.source or f"cluster {self.cluster.name}"


@dataclass(frozen=True, slots=True)
class Progress:
    """A step of the search, for whoever watches: seconds since the start, phase, best value (requests/s)."""

    seconds: float
    phase: str
    value: float


ProgressCallback = Callable[[Progress], None]
Clock = Callable[[], float]


@dataclass
class Budget:
    """What a search may take: seconds on an injected clock, and states valued (None: as many as it likes).

    Without a limit in seconds it never looks at the time, so that its result does not depend on the machine.
    """

    clock: Clock
    limit_s: float | None = None
    progress: ProgressCallback | None = None
    states: int | None = None
    started: float = 0.0
    best: float = 0.0

    def __post_init__(self) -> None:
        self.started = self.clock()

    @property
    def spent_s(self) -> float:
        return self.clock() - self.started

    @property
    def over(self) -> bool:
        if self.states is not None and self.states <= 0:
            return True
        return self.timed_out

    @property
    def timed_out(self) -> bool:
        return self.limit_s is not None and self.spent_s >= self.limit_s

    def count_state(self) -> None:
        """One more state was valued."""
        if self.states is not None:
            self.states -= 1

    def report(self, phase: str, value: float) -> None:
        """Tell of a better plan (only when it is one)."""
        if self.progress is not None and value > self.best:
            self.best = value
            self.progress(Progress(self.spent_s, phase, value))
