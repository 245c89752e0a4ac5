"""Write the shipped folder: weights in bf16, configs, tokenizer and the model card."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import safetensors
import tokenizers
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer

from . import tokenizer as tokenizer_recipe
from .train import MODEL, Result, Schedule

CARD = Path(__file__).resolve().parent.parent / "model_card.md"


def write_folder(folder: Path, result: Result, tokenizer: Tokenizer) -> None:
    """Write all files but the card. Weights are rounded to bf16."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer_recipe.save(tokenizer, folder, MODEL["max_position_embeddings"])
    config = result.model.config
    described = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **MODEL,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }
    (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n")
    generation = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "do_sample": False,
    }
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    tensors = {
        name: tensor.detach().to(torch.bfloat16).contiguous()
        for name, tensor in result.model.state_dict().items()
        if name != "lm_head.weight"  # tied to the embedding
    }
    weights = folder / "model.safetensors"
    save_file(tensors, str(weights), metadata={"format": "pt"})
    weights.chmod(0o644)  # safetensors writes it for its owner alone


def processor_name() -> str:
    """The CPU's name as the kernel gives it, or what the platform knows."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def write_card(folder: Path, result: Result, schedule: Schedule, facts: int, figures: dict[str, str]) -> None:
    """Fill model_card.md with the figures of this training and write it as README.md."""
    values = {
        "parameters": f"{sum(p.numel() for p in result.model.parameters()):,}",
        "facts": str(facts),
        "steps": str(schedule.steps),
        "seed": str(schedule.seed),
        "tokens": f"{result.tokens / 1e6:.1f} million",
        "minutes": f"{result.seconds / 60:.0f}",
        "cpu_minutes": f"{result.cpu_seconds / 60:.0f}",
        "long_one_in": f"{1 / schedule.long_share:.0f}",
        "machine": f"{processor_name()}, one thread",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, tokenizers {tokenizers.__version__}, "
        f"safetensors {safetensors.__version__}",
        "training_loss": f"{result.loss:.3f}",
        **figures,
    }
    card = CARD.read_text()
    for key, value in values.items():
        card = card.replace("{{" + key + "}}", value)
    (folder / "README.md").write_text(card)
