"""Which connector carries a plan's KV caches, and whether it can.

vLLM has two NIXL connectors. With the pull connector the decode engine reads the cache; both sides must have
a single pipeline stage. With the push connector the prefill engine writes it, and may be pipelined; the decode
side may not. In both the TPs of the two ends divide each other. Our own connector moves a cache between any
two layouts (docs/kv-connector.md).

The three speak different protocols and an engine runs one of them, so there is one connector for the whole
plan: pull, which works out of the box on every transport and lets the decode engine start when it has room;
push where some prefill group is pipelined; ours where some group or route is beyond both.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from hexgen2.deploy.options import EngineOptions
from hexgen2.deploy.ranks import divide
from hexgen2.scheduler.engines import RULES, VLLM
from hexgen2.specs.errors import InputError
from hexgen2.specs.plan import Plan, Role

Mode = Literal["pull", "push", "hexgen"]
CONNECTORS: dict[Mode, str] = {
    "pull": "NixlConnector",
    "push": "NixlPushConnector",
    "hexgen": "HexgenConnector",
}
MODULE = "hexgen2.vllm_plugin.kv_connector.connector"
WORDS: dict[Mode, str] = {"pull": "NIXL pull", "push": "NIXL push", "hexgen": "HexgenConnector"}
KV_ROLES: dict[Role, str] = {"prefill": "kv_producer", "decode": "kv_consumer"}


@dataclass(frozen=True)
class Transfer:
    """The connector of a plan and the reason for it, in words."""

    mode: Mode
    reason: str

    @property
    def words(self) -> str:
        """What carries the caches."""
        return WORDS[self.mode]

    @property
    def side_channel(self) -> bool:
        """Whether a group needs a port for vLLM's NIXL handshake; ours choose their own and tell them."""
        return self.mode != "hexgen"

    def config(self, group_id: str, role: Role, options: EngineOptions, processes: int) -> str:
        """vLLM's `--kv-transfer-config` for a prefill or decode group of that many processes."""
        config: dict[str, Any] = {"kv_connector": CONNECTORS[self.mode], "kv_role": KV_ROLES[role]}
        if self.mode == "hexgen":
            config |= {"kv_connector_module_path": MODULE, "kv_role": "kv_both"}
        if options.run_id is not None:
            config["engine_id"] = f"{group_id}-{options.run_id}"
        elif processes > 1:
            config["engine_id"] = group_id  # its processes must be one engine to its peers
        return json.dumps({**config, "kv_load_failure_policy": options.load_failure_policy})


def connector_of(plan: Plan, options: EngineOptions, source: str) -> Mode | None:
    """The connector that a plan's groups run with; None where no group hands a KV cache on."""
    transfer = choose(plan, options, source)
    return None if transfer is None else transfer.mode


@dataclass(frozen=True)
class Obstacle:
    """What keeps vLLM's own connectors from a plan: the plan's field, the problem, the rule in words."""

    field: str
    problem: str
    rule: str


def choose(plan: Plan, options: EngineOptions, source: str) -> Transfer | None:
    """The connector of a plan; None where no group hands a KV cache on. InputError where the one that was asked
    for cannot carry it."""
    if not plan.routes:
        return None
    asked = options.connector
    if asked == "hexgen":
        return Transfer(asked, "it was asked for")
    obstacle = next(obstacles(plan, source), None)
    if obstacle is not None and asked == "auto":
        return Transfer("hexgen", f"{obstacle.field} {obstacle.problem}")
    if obstacle is not None:
        raise InputError(
            source,
            obstacle.field,
            f"{obstacle.problem}, and with vLLM's own connectors {obstacle.rule}",
            f"use 'hexgen' or 'auto', or plan with --engine {VLLM.name}",
        )
    pipelined = [group.id for group in plan.role_groups("prefill") if len(group.stages) > 1]
    if asked == "pull" and pipelined:
        raise InputError(
            "connector",
            "",
            f"'pull' cannot serve prefill group {pipelined[0]}, which has several pipeline stages",
            "use 'push' or 'auto'",
        )
    if asked != "auto":
        return Transfer(asked, "it was asked for")
    if pipelined:
        return Transfer(
            "push", f"prefill group {', '.join(pipelined)} is pipelined, which the pull connector refuses"
        )
    return Transfer("pull", "no prefill group is pipelined")


def obstacles(plan: Plan, source: str) -> Iterator[Obstacle]:
    """What vLLM's own connectors cannot do of a plan."""
    for group in plan.groups:
        if group.role == "colocated":
            continue
        tps = tuple(stage.tp for stage in group.stages)
        rule = VLLM.group_rule(group.role, tps)
        if rule:
            sizes = " then ".join(f"TP {tp}" for tp in tps)
            yield Obstacle(f"group {group.id}", f"has {len(tps)} stages ({sizes})", RULES[rule])
        elif divide(group, source).layout is not None:
            yield Obstacle(
                f"group {group.id}",
                "lies unevenly over nodes",
                "a group has as many ranks on each of its nodes",
            )
    for route in plan.routes:
        ends = [
            tuple(stage.tp for stage in plan.group_by_id[end].stages) for end in (route.source, route.target)
        ]
        rule = VLLM.route_rule(*ends)
        if rule:
            yield Obstacle(
                f"route {route.source} -> {route.target}",
                f"leads from TP {ends[0][0]} to {ends[1][0]}",
                RULES[rule],
            )
