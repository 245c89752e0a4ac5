"""The result of scheduling: serving groups, their layouts, and the routes between them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, ValidationError, model_validator

from hexgen2.specs import files
from hexgen2.specs.base import Spec
from hexgen2.specs.classes import RequestClass, check_class_shares
from hexgen2.specs.cluster import Cluster, parse_cluster
from hexgen2.specs.errors import InputError
from hexgen2.specs.model import Model

PLAN_VERSION = 1
Role = Literal["prefill", "decode", "colocated"]
ROLES: tuple[Role, ...] = get_args(Role)
Init = Literal["spectral", "metis"]
"""What makes the first partition of the GPUs where a search begins from one."""


class Stage(Spec):
    """A pipeline stage: ``tp`` GPUs holding ``layers`` layers from ``first_layer`` on."""

    gpus: tuple[str, ...] = Field(min_length=1)
    tp: int = Field(ge=1)
    first_layer: int = Field(ge=0)
    layers: int = Field(ge=1)

    @model_validator(mode="after")
    def _tp_is_gpus(self) -> Stage:
        if self.tp != len(self.gpus):
            raise ValueError(f"tp is {self.tp} but there are {len(self.gpus)} GPUs; make them equal")
        return self


class RunnerUp(Spec):
    """Another role or layout of a group: the plan's objective with it, and the part of it that is lost so."""

    role: Role
    layout: str
    objective: float
    loss: float


class Group(Spec):
    """A serving group: one replica. ``share`` is the part of all requests that it handles in its role,
    ``class_shares`` the same of each request class where the plan has classes. ``token_budget``: tokens of one
    iteration at most, where its memory asks for fewer than the engine's setting (prefill groups)."""

    id: str
    role: Role
    share: float = Field(ge=0)
    price_per_hour: float = Field(ge=0)
    capacity_rps: float = Field(ge=0)
    max_batch: int = Field(ge=1)
    token_budget: int | None = Field(default=None, ge=1)
    stages: tuple[Stage, ...] = Field(min_length=1)
    runners_up: tuple[RunnerUp, ...] = ()
    class_shares: dict[str, float] = Field(default_factory=dict)

    @property
    def gpus(self) -> tuple[str, ...]:
        """The group's GPUs in rank order: stage by stage."""
        return tuple(gpu for stage in self.stages for gpu in stage.gpus)


class Route(Spec):
    """An edge prefill group → decode group: its share of all requests (and of each request class, where the
    plan has classes), and what its links could carry."""

    source: str = Field(alias="from")
    target: str = Field(alias="to")
    share: float = Field(ge=0)
    rps: float = Field(ge=0)
    capacity_rps: float = Field(ge=0)
    class_shares: dict[str, float] = Field(default_factory=dict)


class LinkLoad(Spec):
    """What KV caches put on the link from one node to another: bytes/s, and the part of the link in use."""

    source: str = Field(alias="from")
    target: str = Field(alias="to")
    bytes_per_s: float = Field(ge=0)
    use: float = Field(ge=0)


class Objective(Spec):
    """What was maximised, and its value at this plan."""

    name: Literal["throughput", "goodput"]
    value: float
    unit: str


class Bottleneck(Spec):
    """What limits the plan: the saturated elements of the minimum cut, and the same in words."""

    elements: tuple[str, ...]
    text: str


class Rejection(Spec):
    """An engine rule (or a whole profile) that kept something better out, and by how much that was better.

    ``gain`` is a part of the plan's objective, or where ``group`` is given of that group's rate.
    """

    rule: str
    detail: str
    gain: float | None = None
    group: str | None = None


ShadowKind = Literal["group", "link", "nic", "port", "gpu"]


class ShadowPrice(Spec):
    """What more of a resource would add: ``change`` is how much more, ``how`` where the figure is from.

    ``dual``: the price of the routes' program; ``resolve``: the routes of the same groups solved again;
    ``replan``: the groups searched again.
    """

    resource: str
    kind: ShadowKind
    change: str
    gain_rps: float = Field(ge=0)
    how: Literal["dual", "resolve", "replan"]


class Slo(Spec):
    """Latency targets in seconds; None where there is none."""

    ttft_s: float | None = Field(default=None, gt=0)
    tpot_s: float | None = Field(default=None, gt=0)


class ClassRouting(Spec):
    """What routing by request class brings: the requests/s carried then, and how much more that is."""

    throughput_rps: float = Field(ge=0)
    gain: float


class Latency(Spec):
    """Seconds: mean, median and 90th percentile; None where there is no end to them."""

    mean: float | None
    p50: float | None
    p90: float | None


class RatePrediction(Spec):
    """A plan at an arrival rate: whether it carries it (keeping its targets where it has any), the part of the
    requests that meet the targets, and latencies; None where a group or link cannot keep up."""

    rate_rps: float = Field(gt=0)
    carried: bool
    attainment: float | None = None
    ttft_s: Latency | None = None
    tpot_s: Latency | None = None


class Plan(Spec):
    """A plan as `hexgen2 plan` writes it (DESIGN section 9). ``cluster`` is the whole cluster, so that the
    file alone can be served; ``model`` and ``workload`` are the names or paths that were asked for.

    Shares, rates and the objective are those of requests that are all routed alike. Where telling request
    classes apart serves more, ``classes`` are they, ``class_shares`` say where each goes, and ``class_routing``
    what it brings; without classes these keys are absent. So are ``at_rate`` where no rate was asked for, and
    ``init`` where it is the default."""

    version: int = PLAN_VERSION
    cluster: Cluster
    model: str
    workload: str
    engine: str
    solver: str
    seed: int
    init: Init = "spectral"
    profiles: tuple[str, ...] = ()
    slo: Slo = Slo()
    objective: Objective
    throughput_rps: float = Field(ge=0)
    output_tokens_per_s: float = Field(ge=0)
    price_per_hour: float = Field(ge=0)
    upper_bound: float | None = None
    gap: float | None = None
    wall_s: float = Field(ge=0)
    groups: tuple[Group, ...]
    routes: tuple[Route, ...]
    links: tuple[LinkLoad, ...] = ()
    bottleneck: Bottleneck
    shadow_prices: tuple[ShadowPrice, ...] = ()
    rejected: tuple[Rejection, ...] = ()
    notes: tuple[str, ...] = ()
    classes: tuple[RequestClass, ...] = ()
    class_routing: ClassRouting | None = None
    at_rate: RatePrediction | None = None

    @cached_property
    def group_by_id(self) -> Mapping[str, Group]:
        return {group.id: group for group in self.groups}

    def role_groups(self, role: Role) -> tuple[Group, ...]:
        return tuple(group for group in self.groups if group.role == role)

    @model_validator(mode="after")
    def _consistent(self) -> Plan:
        used: set[str] = set()
        for group in self.groups:
            next_layer = 0
            for stage in group.stages:
                for gpu in stage.gpus:
                    if gpu not in self.cluster.gpu_by_id:
                        raise ValueError(f"group {group.id}: there is no GPU {gpu!r}; use the cluster's GPUs")
                    if gpu in used:
                        raise ValueError(f"group {group.id}: GPU {gpu!r} is used twice; use each GPU once")
                    used.add(gpu)
                if stage.first_layer != next_layer:
                    raise ValueError(
                        f"group {group.id}: a stage starts at layer {stage.first_layer}, not at {next_layer}; "
                        "let stages follow each other"
                    )
                next_layer += stage.layers
        roles = {group.id: group.role for group in self.groups}
        if len(roles) < len(self.groups):
            raise ValueError("two groups have one id; give each its own")
        for route in self.routes:
            if roles.get(route.source) != "prefill" or roles.get(route.target) != "decode":
                raise ValueError(
                    f"route {route.source} → {route.target} does not lead from a prefill group to a decode "
                    "group; correct its ends"
                )
        total = sum(route.share for route in self.routes)
        total += sum(group.share for group in self.groups if group.role == "colocated")
        if self.groups and abs(total - 1) > 1e-6:
            raise ValueError(f"the shares sum to {total:.6f}; make them sum to 1")
        ways = [(f"route {route.source} → {route.target}", route.class_shares) for route in self.routes]
        ways += [
            (f"group {group.id}", group.class_shares) for group in self.groups if group.role == "colocated"
        ]
        check_class_shares(self.classes, ways)
        return self

    def document(self) -> dict[str, Any]:
        """The plan as the JSON object of DESIGN section 9."""
        document = self.model_dump(mode="json", by_alias=True, exclude={"cluster"})
        if self.at_rate is None:
            del document["at_rate"]
        if self.init == "spectral":
            del document["init"]
        for group in document["groups"]:
            if group["token_budget"] is None:
                del group["token_budget"]
        if not self.classes:
            for key in ("classes", "class_routing"):
                del document[key]
            for part in (*document["groups"], *document["routes"]):
                del part["class_shares"]
        return {"version": document.pop("version"), "cluster": self.cluster.document(), **document}


def check_groups(plan: Plan, model: Model, source: str) -> None:
    """InputError for a plan that nothing can run: without groups, or with groups for another model than this,
    which is what ``plan.model`` names now."""
    if not plan.groups:
        raise InputError(source, "groups", "is empty", "make the plan again")
    for group in plan.groups:
        held = sum(stage.layers for stage in group.stages)
        if held != model.layers:
            raise InputError(
                source,
                f"group {group.id}",
                f"its stages hold {held} layers and {model.name} has {model.layers}",
                "use the model that was planned for, or plan again",
            )


def load_plan(path: str | Path) -> Plan:
    """Read and check a plan file; raises InputError for one that is cut off or was changed into nonsense."""
    return parse_plan(files.read_json(path, "plan file"), str(path))


def parse_plan(document: Mapping[str, Any], source: str) -> Plan:
    """Check a plan document."""
    fields = dict(document)
    version = fields.get("version")
    if version != PLAN_VERSION:
        raise InputError(
            source, "version", f"is {version!r}, this release reads {PLAN_VERSION}", "make the plan again"
        )
    if not isinstance(fields.get("cluster"), dict):
        raise InputError(source, "cluster", "is missing", "make the plan again with `hexgen2 plan`")
    fields["cluster"] = parse_cluster(fields["cluster"], f"{source}: cluster")
    try:
        return Plan.model_validate(fields)
    except ValidationError as error:
        raise InputError.from_validation(source, error) from None
