"""A plan in words: the same lines for the terminal, the picture and the page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby

from hexgen2.specs.plan import Group, Plan, Stage


def stage_words(plan: Plan, stage: Stage, with_layers: bool) -> str:
    """'2×A100-80G-PCIe TP2', and how many layers they hold where a group has several stages."""
    kinds = Counter(plan.cluster.gpu_by_id[gpu].type.name for gpu in stage.gpus)
    words = " + ".join(f"{number}×{kind}" for kind, number in kinds.items())
    if stage.tp > 1:
        words += f" TP{stage.tp}"
    return f"{words}, {stage.layers} layers" if with_layers else words


def layout_words(plan: Plan, group: Group) -> str:
    """A group's stages in order; like ones in a row are said once: '4 stages of 1×L40, 20 layers each'."""
    if len(group.stages) == 1:
        return stage_words(plan, group.stages[0], False)
    parts: list[str] = []
    for _, run in groupby(group.stages, key=lambda stage: stage_words(plan, stage, False)):
        stages = list(run)
        if len(stages) == 1:
            parts.append(stage_words(plan, stages[0], True))
            continue
        layers = sorted({stage.layers for stage in stages})
        spread = str(layers[0]) if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"
        parts.append(f"{len(stages)} stages of {stage_words(plan, stages[0], False)}, {spread} layers each")
    return " → ".join(parts)


def gpus_words(plan: Plan, group: Group) -> str:
    """A group's GPUs by type, shortly: '2×H100 + 1×L40'."""
    kinds = Counter(plan.cluster.gpu_by_id[gpu].type.name.split("-")[0] for gpu in group.gpus)
    return " + ".join(f"{number}×{kind}" for kind, number in kinds.items())


def alike(plan: Plan) -> list[list[Group]]:
    """Groups of one role, layout, rate and load together, in the plan's order."""
    found: dict[tuple[str, ...], list[Group]] = {}
    for group in plan.groups:
        figures = (f"{group.capacity_rps:.3g}", f"{group.share:.3g}", str(group.max_batch))
        found.setdefault((group.role, layout_words(plan, group), *figures), []).append(group)
    return list(found.values())


def ids_words(groups: Sequence[Group]) -> str:
    """The ids of groups, runs shortened."""
    return runs_words([group.id for group in groups])


def runs_words(ids: Sequence[str]) -> str:
    """'p0', 'p3-p7', 'd1, p0, p2-p4': runs of three and more are shortened. A group keeps its letter when it
    takes another role, so letters may be mixed; ids of another kind stand by themselves."""
    runs: list[list[tuple[str, int]]] = []
    others: list[str] = []
    for name in ids:
        if not name[1:].isdecimal():
            others.append(name)
    for letter, number in sorted((name[0], int(name[1:])) for name in ids if name[1:].isdecimal()):
        if runs and runs[-1][-1] == (letter, number - 1):
            runs[-1].append((letter, number))
        else:
            runs.append([(letter, number)])
    words = [[f"{letter}{number}" for letter, number in run] for run in runs]
    return ", ".join([f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(run) for run in words] + others)


def group_line(plan: Plan, group: Group, name: str | None = None) -> str:
    """A group's arithmetic: 'prefill p0: 2×A100-80G-PCIe TP2 → 3.1 req/s'; ``name`` in place of its id."""
    line = f"{group.role} {name or group.id}: {layout_words(plan, group)} → {group.capacity_rps:.3g} req/s"
    return f"{line} at batch {group.max_batch}" if group.role != "prefill" else line


def nodes_words(group: Group) -> str:
    """The GPUs of a group by node: 'a/0-1 b/2'."""
    by_node: dict[str, list[int]] = {}
    for gpu in group.gpus:
        node, index = gpu.rsplit("/", 1)
        by_node.setdefault(node, []).append(int(index))
    return " ".join(f"{node}/{_ranges(sorted(indices))}" for node, indices in by_node.items())


def _ranges(indices: list[int]) -> str:
    parts: list[str] = []
    start = previous = indices[0]
    for index in [*indices[1:], None]:
        if index is not None and index == previous + 1:
            previous = index
            continue
        parts.append(str(start) if start == previous else f"{start}-{previous}")
        if index is not None:
            start = previous = index
    return ",".join(parts)


def class_lines(plan: Plan) -> list[str]:
    """What routing by request class brings, and where each class goes; nothing for a plan without classes."""
    if plan.class_routing is None:
        return []
    routing = plan.class_routing
    found = [f"routed by class it carries {routing.throughput_rps:.4g} requests/s ({routing.gain:+.1%}):"]
    for one in plan.classes:
        ways = {f"{r.source} → {r.target}": r.class_shares.get(one.name, 0.0) for r in plan.routes}
        ways |= {g.id: g.class_shares.get(one.name, 0.0) for g in plan.role_groups("colocated")}
        taken = ", ".join(f"{name} {share:.0%}" for name, share in ways.items() if share >= 0.005)
        which = f"prompts {_range_words(one.prompt_from, one.prompt_to) or 'of any length'}"
        if asked := _range_words(one.output_from, one.output_to):
            which += f", max_tokens {asked}"
        found.append(f"    {one.name} ({one.fraction:.0%}: {which}): {taken}")
    return found


def rate_lines(plan: Plan) -> list[str]:
    """What is predicted for the rate that was asked for."""
    at = plan.at_rate
    if at is None:
        return []
    if at.ttft_s is None or at.tpot_s is None:
        return [f"at {at.rate_rps:g} requests/s a group or link cannot keep up: the rate is not carried"]
    met = "" if at.attainment is None else f", {at.attainment:.0%} of the requests within the targets"
    verdict = "carried" if at.carried else "not carried"
    first, steady = at.ttft_s, at.tpot_s
    return [
        f"at {at.rate_rps:g} requests/s ({verdict}{met}): first token after {_seconds(first.mean)} in the mean "
        f"and {_seconds(first.p90)} at P90; {_seconds(steady.mean)} a token, {_seconds(steady.p90)} at P90"
    ]


def _range_words(start: int, end: int | None) -> str:
    if end is None:
        return f"from {start}" if start else ""
    return f"{start} to {end - 1}" if start else f"below {end}"


def _seconds(value: float | None) -> str:
    return "no end" if value is None else f"{value:.3g} s"
