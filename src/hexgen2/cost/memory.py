"""What fits into a GPU's memory: weights, workspace, and the KV cache in what is left."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from hexgen2.cost.layout import Layout, StageShape
from hexgen2.cost.stage import head_bytes, moe_layers
from hexgen2.specs.gpu import GIB
from hexgen2.specs.model import Model

LEAST_BUDGET = 256
"""Tokens: smaller iterations would read the weights for next to nothing."""


@dataclass(frozen=True)
class Settings:
    """How the engines are run; the defaults are vLLM's, or what `deploy` passes to it.

    ``memory_utilisation`` is the part of a GPU's memory that the engine may use, ``max_batch`` the most
    sequences it runs at once, ``token_budget`` the most tokens of one iteration, ``block_size`` the tokens of a
    KV block.

    ``runtime_bytes`` per GPU: CUDA context, kernels and CUDA graphs (about 0.5 GB + 0.5 GB on vLLM);
    ``communicator_bytes`` more where a group has several GPUs: NCCL's and the all-reduce's buffers. A CPU has
    neither: its catalog memory is what the engine may fill with weights and KV cache.

    ``headroom_sigmas``: a decode batch is chosen so that its contexts overflow the KV cache only beyond that
    many standard deviations (2: about one moment in fifty), because an overflow costs a recomputed prompt.

    ``chunked_prefill``: a colocated group's prompts share iterations with its decoding sequences, as vLLM runs
    them. Without, an iteration has prompts or decoding sequences, prompts first: engines up to 2024, which
    evaluations of that time compare with. No engine that `deploy` starts runs so.

    ``fetch_between_steps``: a decode engine asks for a KV cache when the step under way is over, and looks
    whether it is there at the end of a step, as vLLM's connectors do. Without, it asks at once: engines that
    move caches beside their decoding, as DistServe's.
    """

    memory_utilisation: float = 0.9
    max_batch: int = 256
    token_budget: int = 8192
    block_size: int = 16
    runtime_bytes: float = 1.0 * GIB
    communicator_bytes: float = 0.5 * GIB
    headroom_sigmas: float = 2.0
    chunked_prefill: bool = True
    fetch_between_steps: bool = True

    def prefill_budget(self, max_tokens: int, stages: int) -> int:
        """Tokens of one iteration of a prefill group that holds ``max_tokens`` tokens of KV cache.

        A batch keeps its memory from its start until its caches have been fetched: one batch in every stage,
        one being fetched and one that waits for it must fit together. With a larger budget the first batch
        takes all of the memory, and the other stages stand idle until it is gone.
        """
        return min(self.token_budget, max(LEAST_BUDGET, max_tokens // (stages + 2)))


def stage_weight_bytes(model: Model, stage: StageShape, first_layer: int, *, first: bool, last: bool) -> float:
    """Bytes of weights on the fullest GPU of a stage.

    Heads are split over TP in whole heads (the fullest rank has ⌈A/t⌉ of them), KV heads no further than
    ``kv_shards``; MLA's down-projections and the routers are on every rank, as is a learned position table.
    """
    tp, hidden = stage.tp, model.hidden_size
    moe = moe_layers(model, first_layer, stage.layers)
    params = stage.layers * _attention_params(model, tp)
    params += (stage.layers - moe) * model.mlp_matrices * hidden * model.intermediate_size / tp
    if model.moe is not None:
        inner = model.moe.shared_intermediate_size + model.moe.experts * model.moe.intermediate_size
        params += moe * (model.mlp_matrices * hidden * inner / tp + hidden * model.moe.experts)
    ends = 0.0
    table = model.vocab_size * hidden / tp
    if first:
        ends += table + model.position_embeddings * hidden
    if last and not (first and model.tied_embeddings):
        ends += table
    return params * model.weight_bytes + ends * head_bytes(model)


def workspace_bytes(model: Model, stage: StageShape, settings: Settings, *, last: bool) -> float:
    """Activations on a GPU at the largest iteration: n = token_budget tokens at the widest point of a layer.

    n·B·(2·H + widest), where 2·H are the hidden state and the residual, and ``widest`` the larger of attention
    (queries, keys, values and the output: (2·A·d + 2·A_kv·d)/t) and MLP (gate, up and their product: 3·I/t, or
    2·I/t without gate; with experts k·(3·I_e/t + H) and the shared ones). On the last stage
    the logits of max_batch sequences come on top, once in the activations' width and once in float32 to sample.
    """
    tp, head = stage.tp, model.head_dim
    attention = 2 * (model.attention_width + model.kv_heads * head) / tp
    mlp = model.mlp_matrices * model.intermediate_size / tp
    if model.moe is not None:
        routed = model.moe.active * (model.mlp_matrices * model.moe.intermediate_size / tp + model.hidden_size)
        mlp = max(mlp, routed + model.mlp_matrices * model.moe.shared_intermediate_size / tp)
    widths = 2 * model.hidden_size + max(attention, mlp)
    total = settings.token_budget * model.activation_bytes * widths
    if last:
        total += settings.max_batch * model.vocab_size * (model.activation_bytes + 4)
    return total


def overhead_bytes(stage: StageShape, group_gpus: int, settings: Settings) -> float:
    """Fixed memory of the runtime on a GPU of a group of ``group_gpus`` GPUs."""
    if stage.gpu.vendor == "cpu":
        return 0.0
    return settings.runtime_bytes + (settings.communicator_bytes if group_gpus > 1 else 0.0)


def kv_bytes_per_token(model: Model, stage: StageShape) -> float:
    """KV bytes that one token adds on the fullest GPU of a stage; replicated beyond ``kv_shards``."""
    shards = min(stage.tp, model.kv_shards)
    share = ceil(model.kv_shards / shards) / model.kv_shards
    return stage.layers * model.kv_bytes_per_token_layer * share


@dataclass(frozen=True)
class Memory:
    """Memory of a layout: per stage the bytes of its fullest GPU, and the KV tokens the layout can hold."""

    weights: tuple[float, ...]
    free: tuple[float, ...]
    """Bytes left for the KV cache; negative where the weights do not fit."""
    per_token: tuple[float, ...]
    tps: tuple[int, ...]
    block_size: int

    @property
    def max_tokens(self) -> int:
        """Tokens of KV cache: the fewest whole blocks of any stage (vLLM cuts every rank to the smallest)."""
        blocks = min(
            int(free // (size * self.block_size)) for free, size in zip(self.free, self.per_token, strict=True)
        )
        return max(0, blocks) * self.block_size

    def missing(self, tokens: int) -> float:
        """Bytes lacking, over all GPUs, to hold the weights and ``tokens`` tokens of KV cache."""
        whole = ceil(tokens / self.block_size) * self.block_size
        return sum(
            tp * max(0.0, whole * size - free)
            for tp, free, size in zip(self.tps, self.free, self.per_token, strict=True)
        )


def memory(model: Model, layout: Layout, settings: Settings) -> Memory:
    """Memory of every stage of a layout."""
    weights: list[float] = []
    free: list[float] = []
    gpus = sum(stage.tp for stage in layout)
    first_layer = 0
    for place, stage in enumerate(layout):
        last = place == len(layout) - 1
        weight = stage_weight_bytes(model, stage, first_layer, first=place == 0, last=last)
        used = weight + workspace_bytes(model, stage, settings, last=last)
        used += overhead_bytes(stage, gpus, settings)
        weights.append(weight)
        free.append(settings.memory_utilisation * stage.gpu.memory_bytes - used)
        first_layer += stage.layers
    per_token = tuple(kv_bytes_per_token(model, stage) for stage in layout)
    tps = tuple(stage.tp for stage in layout)
    return Memory(tuple(weights), tuple(free), per_token, tps, settings.block_size)


def _attention_params(model: Model, tp: int) -> float:
    """Attention weights of one layer on the rank with most heads."""
    hidden, mla = model.hidden_size, model.mla
    heads = ceil(model.heads / tp)
    if mla is None:
        kv_heads = ceil(model.kv_heads / min(tp, model.kv_heads))
        return 2.0 * hidden * model.head_dim * (heads + kv_heads)
    query_width = heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim)
    rank = mla.q_lora_rank
    query = hidden * query_width if rank is None else rank * (hidden + query_width)
    down = hidden * (mla.kv_lora_rank + mla.qk_rope_head_dim)
    up = mla.kv_lora_rank * heads * (mla.qk_nope_head_dim + mla.v_head_dim)
    return float(query + down + up + heads * mla.v_head_dim * hidden)
