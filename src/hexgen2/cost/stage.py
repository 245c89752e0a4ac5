"""One pipeline stage reduced to a few numbers, so that its time is a short closed form.

DESIGN section 4 gives the time per layer. All its terms are linear in what an iteration carries, except two
maxima (compute against reading weights) and the number of experts touched. `StageCost` holds the coefficients.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import expm1, log1p

from hexgen2.cost.layout import StageShape
from hexgen2.cost.network import allgather_s, allreduce_s, boundary_s
from hexgen2.cost.profile import Efficiency
from hexgen2.specs.gpu import Link
from hexgen2.specs.model import Model


@dataclass(frozen=True, slots=True)
class StageCost:
    """Seconds of a stage per unit of work. Layers are of two kinds: ``dense`` and ``moe``.

    dense_layers, moe_layers        how many of each the stage holds
    dense_token_s, moe_token_s      per token and layer: the matrix products
    attention_s                     per token² of a prompt and layer
    dense_read_s, moe_read_s        per layer and iteration: reading the weights that every token uses
    experts, expert_miss_log        number of routed experts E, and ln(1 − k/E)
    expert_read_s                   per layer and expert touched
    context_s                       per token of context, all layers: reading the KV cache in decode
    token_s                         per token: all-reduces and the hidden states from the stage before
    head_token_s, head_read_s       LM head, per sequence that yields a token, and its weights (last stage)
    gather_s                        per sequence that yields a token: gathering the logits over TP
    fixed_s                         per iteration: latencies and overheads
    """

    dense_layers: int
    moe_layers: int
    dense_token_s: float
    moe_token_s: float
    attention_s: float
    dense_read_s: float
    moe_read_s: float
    experts: int
    expert_miss_log: float
    expert_read_s: float
    context_s: float
    token_s: float
    head_token_s: float
    head_read_s: float
    gather_s: float
    fixed_s: float

    def seconds(self, tokens: float, squares: float, context: float, yields: float) -> float:
        """One iteration: ``tokens`` go through, of them prompts with Σs² = ``squares``; decoding sequences have
        ``context`` tokens of KV cache together; ``yields`` sequences get a next token.

        Pure prefill has context 0, pure decode squares 0 and tokens = yields.
        """
        attention = squares * self.attention_s
        total = self.fixed_s + tokens * self.token_s + context * self.context_s
        if self.dense_layers:
            total += self.dense_layers * max(tokens * self.dense_token_s + attention, self.dense_read_s)
        if self.moe_layers:
            read = self.moe_read_s + self.expert_read_s * self.touched(tokens)
            total += self.moe_layers * max(tokens * self.moe_token_s + attention, read)
        if yields and self.head_read_s:
            total += max(yields * self.head_token_s, self.head_read_s) + yields * self.gather_s
        return total

    def touched(self, tokens: float) -> float:
        """Expected routed experts that ``tokens`` tokens visit: E·(1 − (1 − k/E)^n), evenly routed.

        Example: E = 8, k = 2: 1 token touches 2, 2 tokens touch 8·(1 − 0.75²) = 3.5.
        """
        return -self.experts * expm1(tokens * self.expert_miss_log)


def moe_layers(model: Model, first_layer: int, layers: int) -> int:
    """How many of the layers first_layer … first_layer + layers − 1 have routed experts."""
    if model.moe is None:
        return 0
    return max(0, first_layer + layers - max(first_layer, model.moe.dense_layers))


def stage_cost(
    model: Model, stage: StageShape, efficiency: Efficiency, first_layer: int, last: bool
) -> StageCost:
    """Reduce a stage holding ``stage.layers`` layers from ``first_layer`` on; ``last``: with the LM head."""
    tp, layers, gpu = stage.tp, stage.layers, stage.gpu
    flops = tp * gpu.flops * efficiency.compute
    reads = tp * gpu.memory_bandwidth * efficiency.memory
    moe = moe_layers(model, first_layer, layers)
    dense_params = model.attention_params + model.mlp_matrices * model.hidden_size * model.intermediate_size
    moe_layer = model.layers - 1  # any layer with experts: they come after the dense ones
    shared_params = model.attention_params + model.dense_mlp_params(moe_layer)
    active_params = model.active_layer_params(moe_layer)

    kv_shards = min(tp, model.kv_shards)
    kv_rate = kv_shards * gpu.memory_bandwidth * efficiency.kv

    link, upstream = _derated(stage.link, efficiency), _derated(stage.upstream, efficiency)
    hidden_bytes = model.hidden_size * model.activation_bytes
    # Two all-reduces a layer (after attention and after the MLP), one for the embedding on the first stage.
    reductions = 2 * layers + (first_layer == 0)
    reduce_latency = allreduce_s(0.0, tp, link)
    token_s = reductions * (allreduce_s(hidden_bytes, tp, link) - reduce_latency)
    token_s += boundary_s(hidden_bytes, upstream) - boundary_s(0.0, upstream)
    fixed_s = reductions * reduce_latency + boundary_s(0.0, upstream)
    fixed_s += layers * efficiency.layer_overhead_s + efficiency.step_overhead_s

    head_token_s = head_read_s = gather_s = 0.0
    if last:
        head_token_s = 2 * model.lm_head_params / flops
        head_read_s = model.lm_head_params * head_bytes(model) / reads
        gather_latency = allgather_s(0.0, tp, link)
        gather_s = allgather_s(model.vocab_size * model.activation_bytes, tp, link) - gather_latency
        fixed_s += gather_latency

    spec = model.moe
    return StageCost(
        dense_layers=layers - moe,
        moe_layers=moe,
        dense_token_s=2 * dense_params / flops,
        moe_token_s=2 * active_params / flops,
        attention_s=2 * model.attention_width / (tp * gpu.flops * efficiency.attention),
        dense_read_s=dense_params * model.weight_bytes / reads,
        moe_read_s=shared_params * model.weight_bytes / reads,
        experts=spec.experts if spec else 0,
        expert_miss_log=log1p(-spec.active / spec.experts) if spec and spec.active < spec.experts else -1e3,
        expert_read_s=model.expert_params * model.weight_bytes / reads,
        context_s=layers * model.kv_bytes_per_token_layer / kv_rate,
        token_s=token_s,
        head_token_s=head_token_s,
        head_read_s=head_read_s,
        gather_s=gather_s,
        fixed_s=fixed_s,
    )


def head_bytes(model: Model) -> float:
    """Bytes per weight of embedding and LM head: quantisation leaves them at the width of activations."""
    return max(model.weight_bytes, model.activation_bytes)


def _derated(link: Link | None, efficiency: Efficiency) -> Link | None:
    return link and Link(bandwidth=link.bandwidth * efficiency.link, latency=link.latency)
