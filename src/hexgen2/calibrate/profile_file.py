"""A fit as a profile file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import floor, log10
from typing import Any

import yaml

from hexgen2.calibrate.fit import Fit, Measured
from hexgen2.cost.profile import Efficiency, FitRecord, Profile

DIGITS = 4


def profile_of(
    name: str, source: str, engine: str, date: str, fits: Mapping[str, tuple[Sequence[Measured], Fit]]
) -> Profile:
    """The profile of fits by GPU type, with how well each is known. Figures have four digits."""
    records: dict[str, FitRecord] = {}
    gpus: dict[str, Efficiency] = {}
    for gpu, (measured, result) in fits.items():
        values = {
            field: _rounded(value) for field, value in result.efficiency.model_dump(exclude_none=True).items()
        }
        gpus[gpu] = Efficiency(**values)
        phases = sorted({one.phase for one in measured})
        records[gpu] = FitRecord(
            measurements=len(measured),
            median_error={
                **{phase: _rounded(result.median_error(measured, phase)) for phase in phases},
                **{phase: _rounded(error) for phase, error in result.apart.items()},
            },
            confidence={
                field: (_rounded(interval.low), _rounded(interval.high))
                for field, interval in result.intervals.items()
            },
        )
    return Profile(name=name, source=source, date=date, engine=engine, gpus=gpus, fits=records)


def profile_text(profile: Profile) -> str:
    """The profile as YAML; what is at its default is left out."""
    document: dict[str, Any] = profile.model_dump(mode="json", exclude_none=True)
    for name, values in document["gpus"].items():
        document["gpus"][name] = {field: value for field, value in values.items() if value != 0.0}
        for field in ("layer_overhead_s", "step_overhead_s"):
            document["gpus"][name].setdefault(field, 0.0)
    for record in document["fits"].values():
        record["confidence"] = {field: _Flow(ends) for field, ends in record["confidence"].items()}
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


class _Flow(list[float]):
    """A list on one line."""


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_representer(
    _Flow, lambda dumper, ends: dumper.represent_sequence("tag:yaml.org,2002:seq", ends, flow_style=True)
)


def _rounded(value: float) -> float:
    """Four significant digits."""
    if value == 0:
        return 0.0
    return round(value, DIGITS - 1 - floor(log10(abs(value))))
