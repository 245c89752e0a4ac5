"""A plan in words: the same lines for the terminal, the picture and the page."""

from __future__ import annotations

from collections import Counter

from hexgen2.specs.plan import Group, Plan, Stage


def stage_words(plan: Plan, stage: Stage, with_layers: bool) -> str:
    """'2×A100-80G-PCIe TP2', and how many layers they hold where a group has several stages."""
    kinds = Counter(plan.cluster.gpu_by_id[gpu].type.name for gpu in stage.gpus)
    words = " + ".join(f"{number}×{kind}" for kind, number in kinds.items())
    if stage.tp > 1:
        words += f" TP{stage.tp}"
    return f"{words}, {stage.layers} layers" if with_layers else words


def layout_words(plan: Plan, group: Group) -> str:
    """A group's stages in order."""
    several = len(group.stages) > 1
    return " → ".join(stage_words(plan, stage, several) for stage in group.stages)


def group_line(plan: Plan, group: Group) -> str:
    """A group's arithmetic: 'prefill p0: 2×A100-80G-PCIe TP2 → 3.1 req/s'."""
    line = f"{group.role} {group.id}: {layout_words(plan, group)} → {group.capacity_rps:.3g} req/s"
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
