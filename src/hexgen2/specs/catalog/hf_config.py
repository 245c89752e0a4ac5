"""A model's shape from its Hugging Face ``config.json``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError

from hexgen2.specs.catalog.quantization import quantization
from hexgen2.specs.errors import InputError, shown
from hexgen2.specs.model import MLA, Model, MoE

Shape = dict[str, Any]
"""Fields of `Model`."""

_DTYPE_BYTES = {"bfloat16": 2.0, "float16": 2.0, "half": 2.0, "float32": 4.0, "float": 4.0}

_MOST = 10**9
_MOST_LAYERS = 10_000
"""No model has as many: more is a slip, and would be counted through for ever."""

_OPT_POSITION_OFFSET = 2  # OPT's position table starts with two rows that stand for padding


class Fields:
    """A config's fields, each checked when it is read; what is wrong is told with the file and the field."""

    def __init__(self, config: Mapping[str, Any], source: str) -> None:
        self._config = config
        self.source = source

    def count(self, name: str, default: int | None = None, *, at_least: int = 1, at_most: int = _MOST) -> int:
        """A whole number; ``default`` where the field is absent or null."""
        value = self._config.get(name)
        if value is None:
            if default is None:
                raise self.missing(name)
            return default
        mend = "correct it to the model's published value"
        if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
            problem = f"{shown(value)} is not a whole number of at least {at_least}"
            raise InputError(self.source, name, problem, mend)
        if value > at_most:
            raise InputError(self.source, name, f"{shown(value)} is more than {at_most:,}", mend)
        return value

    def optional_count(self, name: str) -> int | None:
        """A whole number of at least 1, or None where the field is absent or null."""
        return None if self._config.get(name) is None else self.count(name)

    def flag(self, name: str, default: bool) -> bool:
        value = self._config.get(name, default)
        if not isinstance(value, bool):
            raise InputError(self.source, name, f"{shown(value)} is not true or false", "write true or false")
        return value

    def get(self, name: str) -> Any:
        return self._config.get(name)

    def missing(self, name: str) -> InputError:
        return InputError(self.source, name, "is missing", "add it as the model's published config.json has it")

    def unsupported(self, name: str, what: str) -> InputError:
        value = self._config.get(name)
        return InputError(
            self.source, name, f"{shown(value)} is not supported", f"choose a model {what}; see docs/catalog.md"
        )


def parse_config(config: Mapping[str, Any], *, source: str, name: str, location: str) -> Model:
    """The model that a config describes; raises InputError that names the field."""
    fields = Fields(config, source)
    kind = config.get("model_type")
    if kind is None:
        raise fields.missing("model_type")
    shape_of = _ARCHITECTURES.get(kind) if isinstance(kind, str) else None
    if shape_of is None:
        raise InputError(
            source,
            "model_type",
            f"unknown architecture {kind!r}",
            f"use a model of one of {', '.join(_ARCHITECTURES)}",
        )
    dtype_bytes = _dtype_bytes(fields)
    packed = quantization(config, source, dtype_bytes)
    try:
        return Model(
            name=name,
            location=location,
            layers=fields.count("num_hidden_layers", at_most=_MOST_LAYERS),
            hidden_size=fields.count("hidden_size"),
            vocab_size=fields.count("vocab_size"),
            max_positions=fields.count("max_position_embeddings"),
            weight_bytes=packed.weight_bytes,
            kv_bytes=packed.kv_bytes,
            activation_bytes=dtype_bytes,
            **shape_of(fields),
        )
    except ValidationError as error:
        raise InputError.from_validation(source, error) from None


def _dtype_bytes(fields: Fields) -> float:
    """Bytes per element in the config's dtype; 2 where it has none (engines then load 16-bit weights)."""
    field = "dtype" if fields.get("dtype") is not None else "torch_dtype"
    dtype = fields.get(field)
    if dtype is None:
        return 2.0
    if not isinstance(dtype, str) or dtype not in _DTYPE_BYTES:
        raise InputError(fields.source, field, f"unknown dtype {dtype!r}", "use bfloat16, float16 or float32")
    return _DTYPE_BYTES[dtype]


def _attention(fields: Fields) -> Shape:
    """Grouped-query attention: as many KV heads as heads where the config does not say."""
    heads = fields.count("num_attention_heads")
    return {
        "heads": heads,
        "kv_heads": fields.count("num_key_value_heads", heads),
        "head_dim": fields.count("head_dim", _even_head_dim(fields, heads)),
    }


def _even_head_dim(fields: Fields, heads: int) -> int | None:
    """hidden_size / heads, for configs without head_dim; None (it is needed then) when that is not whole."""
    hidden = fields.count("hidden_size")
    return None if hidden % heads else hidden // heads


def _tied(fields: Fields, default: bool = False) -> bool:
    return fields.flag("tie_word_embeddings", default)


def _llama(fields: Fields) -> Shape:
    return {
        **_attention(fields),
        "intermediate_size": fields.count("intermediate_size"),
        "tied_embeddings": _tied(fields),
    }


def _opt(fields: Fields) -> Shape:
    if fields.count("word_embed_proj_dim", fields.count("hidden_size")) != fields.count("hidden_size"):
        raise fields.unsupported("word_embed_proj_dim", "whose embeddings are as wide as its layers")
    return {
        **_attention(fields),
        "intermediate_size": fields.count("ffn_dim"),
        "gated_mlp": False,
        "tied_embeddings": _tied(fields, default=True),
        "position_embeddings": fields.count("max_position_embeddings") + _OPT_POSITION_OFFSET,
    }


def _mixtral(fields: Fields) -> Shape:
    width = fields.count("intermediate_size")
    moe = MoE(
        experts=fields.count("num_local_experts"),
        active=fields.count("num_experts_per_tok"),
        intermediate_size=width,
    )
    return {**_attention(fields), "intermediate_size": width, "moe": moe, "tied_embeddings": _tied(fields)}


def _qwen3_moe(fields: Fields) -> Shape:
    if fields.count("decoder_sparse_step", 1) != 1:
        raise fields.unsupported("decoder_sparse_step", "with experts in every layer after the dense ones")
    dense = fields.get("mlp_only_layers") or []
    if not isinstance(dense, list) or dense != list(range(len(dense))):
        raise fields.unsupported("mlp_only_layers", "whose dense layers come first")
    moe = MoE(
        experts=fields.count("num_experts"),
        active=fields.count("num_experts_per_tok"),
        intermediate_size=fields.count("moe_intermediate_size"),
        dense_layers=len(dense),
    )
    return {
        **_attention(fields),
        "intermediate_size": fields.count("intermediate_size"),
        "moe": moe,
        "tied_embeddings": _tied(fields),
    }


def _deepseek_v2(fields: Fields) -> Shape:
    if fields.count("moe_layer_freq", 1) != 1:
        raise fields.unsupported("moe_layer_freq", "with experts in every layer after the dense ones")
    heads = fields.count("num_attention_heads")
    mla = MLA(
        kv_lora_rank=fields.count("kv_lora_rank"),
        q_lora_rank=fields.optional_count("q_lora_rank"),
        qk_nope_head_dim=fields.count("qk_nope_head_dim"),
        qk_rope_head_dim=fields.count("qk_rope_head_dim"),
        v_head_dim=fields.count("v_head_dim"),
    )
    width = fields.count("moe_intermediate_size")
    moe = MoE(
        experts=fields.count("n_routed_experts"),
        active=fields.count("num_experts_per_tok"),
        intermediate_size=width,
        shared_intermediate_size=width * fields.count("n_shared_experts", 0, at_least=0),
        dense_layers=fields.count("first_k_dense_replace", 0, at_least=0),
    )
    return {
        "heads": heads,
        "kv_heads": heads,
        "head_dim": mla.qk_nope_head_dim + mla.qk_rope_head_dim,
        "intermediate_size": fields.count("intermediate_size"),
        "mla": mla,
        "moe": moe,
        "tied_embeddings": _tied(fields),
    }


_ARCHITECTURES: Mapping[str, Callable[[Fields], Shape]] = {
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _llama,
    "qwen3": _llama,
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
    "deepseek_v2": _deepseek_v2,
    "opt": _opt,
}
