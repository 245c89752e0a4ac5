"""Bytes per weight and per KV element from a config's ``quantization_config``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hexgen2.specs.errors import InputError, shown

_SCALE_BYTES = 2.0  # a group's scale is a 16-bit number
_NF4_BLOCK = 64  # weights per scale in bitsandbytes' 4-bit types
_NF4_NESTED_BLOCK = 256  # scales per second-level scale when they are quantised too

_AS_PUBLISHED = "write it as the model's publisher does"


@dataclass(frozen=True, slots=True)
class Quantization:
    """Bytes per weight with its share of scales and zero points, and bytes per KV-cache element."""

    weight_bytes: float
    kv_bytes: float


def quantization(config: Mapping[str, Any], source: str, dtype_bytes: float) -> Quantization:
    """What a config's ``quantization_config`` says; without one, weights and KV cache are in the model's dtype.

    Raises InputError for a method that is not known, or one that lacks a field.
    """
    section = config.get("quantization_config")
    if section is None:
        return Quantization(dtype_bytes, dtype_bytes)
    if not isinstance(section, Mapping):
        raise InputError(source, "quantization_config", "is not an object", _AS_PUBLISHED)
    method = section.get("quant_method")
    weight_bytes = _METHODS.get(method) if isinstance(method, str) else None
    if weight_bytes is None:
        raise InputError(
            source,
            "quantization_config.quant_method",
            f"unknown method {method!r}",
            f"use a model quantised with {', '.join(_METHODS)}, or one that is not quantised",
        )
    return Quantization(weight_bytes(section, source, dtype_bytes), _kv_bytes(section, source, dtype_bytes))


def _fp8(_section: Mapping[str, Any], _source: str, _dtype_bytes: float) -> float:
    return 1.0  # a scale per tensor, channel or block of 128 x 128: under 0.1%


def _integer_groups(section: Mapping[str, Any], source: str, dtype_bytes: float) -> float:
    """AWQ and GPTQ: each group has a 16-bit scale and a zero point as wide as a weight."""
    bits = _number(section, "bits", source, "quantization_config.bits")
    group = _number(section, "group_size", source, "quantization_config.group_size", default=-1)
    return min(dtype_bytes, _grouped(bits, group, zero_points=True))


def _bitsandbytes(section: Mapping[str, Any], source: str, _dtype_bytes: float) -> float:
    if section.get("load_in_8bit"):
        return 1.0
    if not section.get("load_in_4bit"):
        raise InputError(
            source,
            "quantization_config",
            "has neither load_in_4bit nor load_in_8bit",
            "set the one that the weights are in",
        )
    nested = section.get("bnb_4bit_use_double_quant", False)
    scale = 1.0 + 4.0 / _NF4_NESTED_BLOCK if nested else 4.0
    return 0.5 + scale / _NF4_BLOCK


def _compressed_tensors(section: Mapping[str, Any], source: str, dtype_bytes: float) -> float:
    """The widest of the config groups: layers outside all of them (the LM head) stay in the model's dtype."""
    groups = section.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise InputError(
            source,
            "quantization_config.config_groups",
            "is missing or empty",
            _AS_PUBLISHED,
        )
    widest = 0.0
    for name, group in groups.items():
        field = f"quantization_config.config_groups.{name}.weights"
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping):
            raise InputError(source, field, "is missing", _AS_PUBLISHED)
        bits = _number(weights, "num_bits", source, f"{field}.num_bits")
        size = _number(weights, "group_size", source, f"{field}.group_size", default=-1)
        zero_points = not weights.get("symmetric", True)
        widest = max(widest, _grouped(bits, size, zero_points=zero_points))
    return min(dtype_bytes, widest)


def _grouped(bits: int, group_size: int, *, zero_points: bool) -> float:
    """Bytes per weight of ``bits`` with a scale (and a zero point) per group; -1: one per row, so nothing."""
    per_group = _SCALE_BYTES + (bits / 8 if zero_points else 0.0)
    return bits / 8 + (per_group / group_size if group_size > 0 else 0.0)


def _kv_bytes(section: Mapping[str, Any], source: str, dtype_bytes: float) -> float:
    """Compressed-tensors checkpoints may ask for a quantised KV cache; the others leave it in the dtype."""
    scheme = section.get("kv_cache_scheme")
    if not isinstance(scheme, Mapping):
        return dtype_bytes
    return _number(scheme, "num_bits", source, "quantization_config.kv_cache_scheme.num_bits") / 8


def _number(section: Mapping[str, Any], name: str, source: str, field: str, default: int | None = None) -> int:
    """A whole number of at least 1, or ``default``, which also stands for an absent or null one."""
    value = section.get(name)
    if value is None and default is not None:
        return default
    allowed = isinstance(value, int) and not isinstance(value, bool) and (value >= 1 or value == default)
    if not allowed:
        problem = "is missing" if value is None else f"{shown(value)} is not a whole number of at least 1"
        raise InputError(source, field, problem, _AS_PUBLISHED)
    assert isinstance(value, int)
    return value


_METHODS: Mapping[str, Callable[[Mapping[str, Any], str, float], float]] = {
    "fp8": _fp8,
    "fbgemm_fp8": _fp8,
    "awq": _integer_groups,
    "gptq": _integer_groups,
    "bitsandbytes": _bitsandbytes,
    "compressed-tensors": _compressed_tensors,
}
