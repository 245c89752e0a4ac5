"""Which of vLLM's NIXL connectors carries a plan's KV caches, and whether it can.

vLLM has two. With the pull connector the decode engine reads the cache; both sides must have a single
pipeline stage. With the push connector the prefill engine writes it, and may be pipelined; the decode side
may not. The two speak different protocols (the mode is part of the handshake's compatibility hash), and an
engine runs one of them, so a decode group that is fed by a pipelined and by a plain prefill group needs push
on both. To keep a plan's engines interchangeable there is one connector for the whole plan: pull, which works
out of the box on every transport and lets the decode engine start when it has room, unless some prefill group
is pipelined.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

from hexgen2.deploy.options import EngineOptions
from hexgen2.scheduler.engines import RULES, TP_DIVIDES, VLLM
from hexgen2.specs.errors import InputError
from hexgen2.specs.plan import Group, Plan, Role

CONNECTORS = {"pull": "NixlConnector", "push": "NixlPushConnector"}
KV_ROLES: dict[Role, str] = {"prefill": "kv_producer", "decode": "kv_consumer"}


@dataclass(frozen=True)
class Transfer:
    """The connector of a plan and the reason for it, in words."""

    mode: Literal["pull", "push"]
    reason: str

    def config(self, group: Group, options: EngineOptions, processes: int) -> str:
        """vLLM's `--kv-transfer-config` for a prefill or decode group of that many processes."""
        config = {"kv_connector": CONNECTORS[self.mode], "kv_role": KV_ROLES[group.role]}
        if options.run_id is not None:
            config["engine_id"] = f"{group.id}-{options.run_id}"
        elif processes > 1:
            config["engine_id"] = group.id  # its processes must be one engine to NIXL
        return json.dumps({**config, "kv_load_failure_policy": options.load_failure_policy})


def choose(plan: Plan, options: EngineOptions, source: str) -> Transfer | None:
    """The connector of a plan; None where no group hands a KV cache on. InputError for what vLLM cannot
    do."""
    for group in plan.groups:
        rule = VLLM.group_rule(group.role, tuple(stage.tp for stage in group.stages))
        if rule:
            raise InputError(
                source,
                f"group {group.id}",
                f"vLLM cannot run it: {RULES[rule]}",
                f"plan with --engine {VLLM.name}",
            )
    for route in plan.routes:
        ends = (plan.group_by_id[route.source], plan.group_by_id[route.target])
        small, large = sorted(end.stages[0].tp for end in ends)
        if large % small:
            raise InputError(
                source,
                f"route {route.source} -> {route.target}",
                f"vLLM cannot transfer its KV caches (TP {ends[0].stages[0].tp} -> {ends[1].stages[0].tp}): "
                f"{RULES[TP_DIVIDES]}",
                f"plan with --engine {VLLM.name}",
            )
    if not plan.routes:
        return None
    pipelined = [group.id for group in plan.role_groups("prefill") if len(group.stages) > 1]
    if options.connector == "pull" and pipelined:
        raise InputError(
            "connector",
            "",
            f"'pull' cannot serve prefill group {pipelined[0]}, which has several pipeline stages",
            "use 'push' or 'auto'",
        )
    if options.connector != "auto":
        return Transfer(options.connector, "as asked for")
    if pipelined:
        return Transfer(
            "push", f"prefill group {', '.join(pipelined)} is pipelined, which the pull connector refuses"
        )
    return Transfer("pull", "no prefill group is pipelined")
