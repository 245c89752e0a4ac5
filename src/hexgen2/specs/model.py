"""A model's shape: what the cost model needs to know of a decoder-only transformer."""

from __future__ import annotations

from functools import cached_property

from pydantic import Field, model_validator

from hexgen2.specs.base import Spec


class MoE(Spec):
    """Mixture of experts: ``experts`` routed ones of width ``intermediate_size``, ``active`` of them per token.

    ``shared_intermediate_size`` is the summed width of experts that every token visits; the first
    ``dense_layers`` layers of the model have an ordinary MLP instead.
    """

    experts: int = Field(ge=1)
    active: int = Field(ge=1)
    intermediate_size: int = Field(ge=1)
    shared_intermediate_size: int = Field(default=0, ge=0)
    dense_layers: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _active_exist(self) -> MoE:
        if self.active > self.experts:
            raise ValueError(
                f"{self.active} experts per token, but there are only {self.experts}; correct one of them"
            )
        return self


class MLA(Spec):
    """Multi-head latent attention (DeepSeek-V2): one compressed KV vector per token, shared by all heads."""

    kv_lora_rank: int = Field(ge=1)
    qk_rope_head_dim: int = Field(ge=1)
    qk_nope_head_dim: int = Field(ge=1)
    v_head_dim: int = Field(ge=1)
    q_lora_rank: int | None = Field(default=None, ge=1)


class Model(Spec):
    """A decoder-only transformer. Counts of parameters leave out norms and biases (under 0.1%).

    ``weight_bytes`` and ``kv_bytes`` are bytes per weight and per KV-cache element (2 for 16-bit types, 1 for
    fp8, about 0.56 for 4-bit groups of 128 with their scales). ``activation_bytes`` is the width of what is
    sent between GPUs. ``location`` is what an engine loads: a directory or a hub id.
    """

    name: str
    layers: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    heads: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    intermediate_size: int = Field(ge=1)
    vocab_size: int = Field(ge=1)
    gated_mlp: bool = True
    tied_embeddings: bool = False
    position_embeddings: int = Field(default=0, ge=0)
    """Rows of a learned position table (OPT); 0 with rotary embeddings."""
    max_positions: int = Field(ge=1)
    moe: MoE | None = None
    mla: MLA | None = None
    weight_bytes: float = Field(default=2.0, gt=0)
    kv_bytes: float = Field(default=2.0, gt=0)
    activation_bytes: float = Field(default=2.0, gt=0)
    location: str = ""

    @model_validator(mode="after")
    def _heads_divide(self) -> Model:
        if self.mla is None and self.heads % self.kv_heads:
            raise ValueError(
                f"{self.heads} attention heads do not divide over {self.kv_heads} KV heads; correct one of them"
            )
        return self

    @cached_property
    def attention_params(self) -> int:
        """Weights of one layer's attention: the projections of queries, keys, values and the output."""
        if self.mla is None:
            width = self.heads * self.head_dim
            return self.hidden_size * (2 * width + 2 * self.kv_heads * self.head_dim)
        mla, hidden = self.mla, self.hidden_size
        query_width = self.heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim)
        rank = mla.q_lora_rank
        query = hidden * query_width if rank is None else rank * (hidden + query_width)
        down = hidden * (mla.kv_lora_rank + mla.qk_rope_head_dim)
        up = mla.kv_lora_rank * self.heads * (mla.qk_nope_head_dim + mla.v_head_dim)
        return query + down + up + self.heads * mla.v_head_dim * hidden

    @property
    def mlp_matrices(self) -> int:
        """Matrices of an MLP: gate, up and down, or up and down."""
        return 3 if self.gated_mlp else 2

    def is_moe_layer(self, layer: int) -> bool:
        return self.moe is not None and layer >= self.moe.dense_layers

    @cached_property
    def expert_params(self) -> int:
        """Weights of one routed expert; 0 for a dense model."""
        return self.mlp_matrices * self.hidden_size * self.moe.intermediate_size if self.moe else 0

    def dense_mlp_params(self, layer: int) -> int:
        """Weights of a layer's MLP that every token uses: the MLP itself, or shared experts and the router."""
        if self.moe is not None and layer >= self.moe.dense_layers:
            shared = self.mlp_matrices * self.hidden_size * self.moe.shared_intermediate_size
            return shared + self.hidden_size * self.moe.experts
        return self.mlp_matrices * self.hidden_size * self.intermediate_size

    def layer_params(self, layer: int) -> int:
        """All weights of a layer (P in DESIGN section 4), every expert counted."""
        routed = self.moe.experts * self.expert_params if self.moe and self.is_moe_layer(layer) else 0
        return self.attention_params + self.dense_mlp_params(layer) + routed

    @cached_property
    def layers_params(self) -> int:
        """All weights of all layers."""
        return sum(self.layer_params(layer) for layer in range(self.layers))

    def active_layer_params(self, layer: int) -> int:
        """Weights of a layer that one token is multiplied with."""
        routed = self.moe.active * self.expert_params if self.moe and self.is_moe_layer(layer) else 0
        return self.attention_params + self.dense_mlp_params(layer) + routed

    @cached_property
    def embedding_params(self) -> int:
        """The token table, and the position table where it is learned; on the first stage."""
        return (self.vocab_size + self.position_embeddings) * self.hidden_size

    @cached_property
    def lm_head_params(self) -> int:
        """The output projection; on the last stage, also when it is tied (a copy there if PP > 1)."""
        return self.vocab_size * self.hidden_size

    @cached_property
    def total_params(self) -> int:
        """All weights of the model."""
        head = 0 if self.tied_embeddings else self.lm_head_params
        return self.embedding_params + head + self.layers_params

    @cached_property
    def attention_width(self) -> int:
        """A·d of DESIGN section 4: what the attention scores and their sum cost per pair of tokens, halved.

        With MLA the scores run over nope + rope dimensions and the sum over the value dimension.
        """
        if self.mla is None:
            return self.heads * self.head_dim
        score = self.mla.qk_nope_head_dim + self.mla.qk_rope_head_dim
        return self.heads * (score + self.mla.v_head_dim) // 2

    @cached_property
    def kv_bytes_per_token_layer(self) -> float:
        """Bytes that one token adds to one layer's KV cache: 2·A_kv·d·B_kv, or the latent vector with MLA."""
        if self.mla is None:
            return 2 * self.kv_heads * self.head_dim * self.kv_bytes
        return (self.mla.kv_lora_rank + self.mla.qk_rope_head_dim) * self.kv_bytes

    @cached_property
    def kv_bytes_per_token(self) -> float:
        """Bytes that one token adds to the KV cache, all layers."""
        return self.layers * self.kv_bytes_per_token_layer

    @property
    def kv_shards(self) -> int:
        """The largest TP over which the KV cache is split; beyond it, it is replicated (A_kv; 1 with MLA)."""
        return 1 if self.mla is not None else self.kv_heads
