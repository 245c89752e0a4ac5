"""GPU types and their hourly prices, from gpus.yaml and prices.yaml."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError

from hexgen2.specs.base import Spec
from hexgen2.specs.errors import InputError
from hexgen2.specs.gpu import GIB, GpuType, Link


class LinkEntry(Spec):
    """The link between two GPUs of a node: gigabytes per second each way, microseconds."""

    kind: str
    gb_s: float = Field(gt=0)
    latency_us: float = Field(ge=0)


class Document(Spec):
    """Where a figure of the catalog was read, and when."""

    title: str
    url: str
    read: datetime.date


class GpuEntry(Spec):
    """A GPU type as the catalog (or a cluster file's gpu_types) writes it.

    ``sources`` says for each figure where it is from: in the catalog the key of one of its documents, in a
    cluster file whatever its author writes.
    """

    name: str
    vendor: Literal["nvidia", "amd", "cpu"]
    generation: str
    memory_gib: float = Field(gt=0)
    dense_tflops: float = Field(gt=0)
    dense_dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    memory_bandwidth_gb_s: float = Field(gt=0)
    link: LinkEntry
    sources: dict[str, str] = Field(default_factory=dict)

    def gpu_type(self) -> GpuType:
        return GpuType(
            name=self.name,
            vendor=self.vendor,
            generation=self.generation,
            memory_bytes=self.memory_gib * GIB,
            flops=self.dense_tflops * 1e12,
            dense_dtype=self.dense_dtype,
            memory_bandwidth=self.memory_bandwidth_gb_s * 1e9,
            link_kind=self.link.kind,
            link=Link(bandwidth=self.link.gb_s * 1e9, latency=self.link.latency_us * 1e-6),
        )


class PriceEntry(Spec):
    """USD per GPU and hour, on demand: from where, and of which day (of reading where the source has none)."""

    usd_per_hour: float = Field(ge=0)
    source: str
    date: datetime.date


def gpu_type(name: str) -> GpuType:
    """The catalog's GPU type of that name; KeyError when there is none."""
    return _types()[name]


def gpu_type_names() -> tuple[str, ...]:
    """Every GPU type of the catalog, in its order."""
    return tuple(_types())


def gpu_sources(name: str) -> Mapping[str, Document]:
    """Where the figures of a catalog type are from, by field; KeyError when there is no such type."""
    documents = _documents()
    return {field: documents[key] for field, key in _entries()[name].sources.items()}


def gpu_price(name: str) -> float | None:
    """The catalog's hourly price of a GPU type in USD; None when it has none (the CPU devices)."""
    entry = gpu_prices().get(name)
    return None if entry is None else entry.usd_per_hour


@cache
def gpu_prices() -> Mapping[str, PriceEntry]:
    """The catalog's price table."""
    return {name: PriceEntry.model_validate(entry) for name, entry in _read("prices.yaml")["gpus"].items()}


def parse_gpu_type(entry: object, source: str, field: str) -> GpuType:
    """A GPU type from a YAML mapping; raises InputError that names the field."""
    try:
        return GpuEntry.model_validate(entry).gpu_type()
    except ValidationError as error:
        wrong = InputError.from_validation(source, error)
        place = f"{field}.{wrong.field}" if wrong.field else field
        raise InputError(source, place, wrong.problem, wrong.mend) from None


@cache
def _types() -> Mapping[str, GpuType]:
    return {name: entry.gpu_type() for name, entry in _entries().items()}


@cache
def _entries() -> Mapping[str, GpuEntry]:
    entries = [GpuEntry.model_validate(entry) for entry in _read("gpus.yaml")["gpus"]]
    return {entry.name: entry for entry in entries}


@cache
def _documents() -> Mapping[str, Document]:
    return {key: Document.model_validate(entry) for key, entry in _read("gpus.yaml")["documents"].items()}


def _read(name: str) -> dict[str, Any]:
    text = resources.files("hexgen2.specs.catalog").joinpath(name).read_text(encoding="utf-8")
    document: dict[str, Any] = yaml.safe_load(text)
    return document
