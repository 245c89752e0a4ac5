"""Tiny models of other kinds than the shipped one, with random weights, for the tests of layouts.

All have 8 layers, 8 heads and 2048 tokens; no tokenizer, since the tests send token ids.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

LAYERS = 8
_COMMON: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
    # Wide, so that logits differ from token to token: at the usual 0.02 answers repeat themselves, with ties.
    "initializer_range": 0.15,
}


def _qwen3() -> Any:
    """Dense, with norms on queries and keys."""
    from transformers import Qwen3Config

    return Qwen3Config(**_COMMON, num_key_value_heads=4, head_dim=32)


def _mixtral() -> Any:
    """A mixture of 4 experts, 2 of them used."""
    from transformers import MixtralConfig

    return MixtralConfig(
        **_COMMON, num_key_value_heads=4, head_dim=32, num_local_experts=4, num_experts_per_tok=2
    )


def _deepseek() -> Any:
    """Multi-head latent attention, and experts from the second layer on."""
    from transformers import DeepseekV2Config

    return DeepseekV2Config(
        **_COMMON,
        num_key_value_heads=8,
        q_lora_rank=None,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        moe_intermediate_size=64,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        topk_method="greedy",
        n_group=1,
        topk_group=1,
        norm_topk_prob=False,
        routed_scaling_factor=1.0,
    )


CONFIGS: dict[str, Callable[[], Any]] = {"qwen3": _qwen3, "mixtral": _mixtral, "deepseek-v2": _deepseek}


def write_model(kind: str, folder: Path) -> Path:
    """Write a random model (always the same one) as vLLM reads it; returns the folder."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind]()).float()
    model.save_pretrained(folder)
    return folder
