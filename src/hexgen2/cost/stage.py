"""One pipeline stage reduced to a few numbers, so that its time is a short closed form.

DESIGN section 4 gives the time per layer. All its terms are linear in what an iteration carries, except maxima
(compute against reading weights, the device against the host that launches its kernels), the number of experts
touched, and all-reduces of more than a given size. `StageCost` holds the coefficients.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import expm1, inf, log1p

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
    gather_s                        per sequence that yields a token: gathering the logits over TP, sampling
    fixed_s                         per iteration: latencies and overheads of the layers
    step_s, prompt_s                per iteration, and per iteration with prompts: overheads beside the layers
    request_s                       per request whose prompt begins
    handoff_s, handoff_token_s      per request whose KV cache was taken over, and per token of its prompt
    wait_s, wait_token_s            that such a request alone waits, beyond the links' time
    send_s, send_token_s            per KV cache that is sent to a decode group, and per token of its prompt
    launch_s                        per iteration: the host's time to launch the layers' kernels
    large_token_s, small_tokens     per token beyond ``small_tokens`` of an iteration: all-reduces are slower
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
    step_s: float
    prompt_s: float
    request_s: float
    handoff_s: float
    handoff_token_s: float
    wait_s: float
    wait_token_s: float
    send_s: float
    send_token_s: float
    launch_s: float
    large_token_s: float
    small_tokens: float

    def seconds(
        self,
        tokens: float,
        squares: float,
        context: float,
        yields: float,
        begun: float = 0.0,
        taken: float = 0.0,
        taken_tokens: float = 0.0,
    ) -> float:
        """One iteration: ``tokens`` go through, of them prompts with Σs² = ``squares``; decoding sequences have
        ``context`` tokens of KV cache together; ``yields`` sequences get a next token; the prompts of ``begun``
        requests begin, and ``taken`` others go on from KV caches that came from elsewhere, of ``taken_tokens``
        tokens in all.

        Pure prefill has context 0, pure decode squares 0 and tokens = yields.
        """
        attention = squares * self.attention_s
        busy = self.fixed_s + tokens * self.token_s
        if tokens > self.small_tokens:
            busy += (tokens - self.small_tokens) * self.large_token_s
        if self.dense_layers:
            busy += self.dense_layers * max(tokens * self.dense_token_s + attention, self.dense_read_s)
        if self.moe_layers:
            read = self.moe_read_s + self.expert_read_s * self.touched(tokens)
            busy += self.moe_layers * max(tokens * self.moe_token_s + attention, read)
        # Reading the KV cache stays outside of the maximum, so that the time is linear in the context.
        total = max(busy, self.launch_s) + context * self.context_s + self.step_s
        total += begun * self.request_s + taken * self.handoff_s + taken_tokens * self.handoff_token_s
        if squares:
            total += self.prompt_s
        if yields and self.head_read_s:
            total += max(yields * self.head_token_s, self.head_read_s) + yields * self.gather_s
        return total

    def sending_s(self, caches: float, tokens: float) -> float:
        """Seconds that sending so many KV caches, of ``tokens`` tokens in all, takes from the stage's work."""
        return caches * self.send_s + tokens * self.send_token_s

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
    # What a GPU of the stage holds of a token, which is what it sends or takes in.
    held_bytes = layers * model.kv_bytes_per_token_layer / kv_shards
    first = first_layer == 0

    link, upstream = _derated(stage.link, efficiency.link), _derated(stage.upstream, efficiency.link)
    hidden_bytes = model.hidden_size * model.activation_bytes
    # Two all-reduces a layer (after attention and after the MLP), one for the embedding on the first stage.
    reductions = 2 * layers + first
    # Kernels that read all peers at once need the GPUs' own links; over a network it is a ring.
    inside = stage.link is not None and stage.link.latency <= gpu.link.latency
    hops = efficiency.reduce_hops if inside else None
    reduce_latency = allreduce_s(0.0, tp, link, hops)
    token_s = reductions * (allreduce_s(hidden_bytes, tp, link, hops) - reduce_latency)
    token_s += boundary_s(hidden_bytes, upstream) - boundary_s(0.0, upstream)
    fixed_s = reductions * reduce_latency + boundary_s(0.0, upstream)
    fixed_s += layers * efficiency.layer_overhead_s
    large_token_s, small_tokens = 0.0, inf
    if tp > 1 and stage.link and efficiency.large_link and efficiency.large_message_bytes:
        large = _derated(stage.link, efficiency.large_link)
        large_token_s = reductions * (
            allreduce_s(hidden_bytes, tp, large, hops) - allreduce_s(hidden_bytes, tp, link, hops)
        )
        small_tokens = efficiency.large_message_bytes / hidden_bytes

    head_token_s = head_read_s = gather_s = 0.0
    if last:
        head_token_s = 2 * model.lm_head_params / flops
        head_read_s = model.lm_head_params * head_bytes(model) / reads
        gather_latency = allgather_s(0.0, tp, link, hops)
        gather_s = allgather_s(model.vocab_size * model.activation_bytes, tp, link, hops) - gather_latency
        gather_s += efficiency.sequence_overhead_s
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
        step_s=efficiency.step_overhead_s,
        prompt_s=efficiency.prompt_overhead_s,
        request_s=efficiency.request_overhead_s if first else 0.0,
        handoff_s=efficiency.handoff_overhead_s if first else 0.0,
        handoff_token_s=held_bytes * efficiency.handoff_byte_s,
        wait_s=efficiency.handoff_wait_s if first else 0.0,
        wait_token_s=held_bytes * efficiency.handoff_wait_byte_s,
        send_s=efficiency.send_overhead_s if first else 0.0,
        send_token_s=held_bytes * efficiency.send_byte_s,
        launch_s=layers * efficiency.layer_launch_s,
        large_token_s=large_token_s,
        small_tokens=small_tokens,
    )


def head_bytes(model: Model) -> float:
    """Bytes per weight of embedding and LM head: quantisation leaves them at the width of activations."""
    return max(model.weight_bytes, model.activation_bytes)


def _derated(link: Link | None, fraction: float) -> Link | None:
    return link and Link(bandwidth=link.bandwidth * fraction, latency=link.latency)
