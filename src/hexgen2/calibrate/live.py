"""The fit of what was measured on live engines."""

from __future__ import annotations

from collections.abc import Sequence

from hexgen2.calibrate.fit import Fit, Measured, fit
from hexgen2.calibrate.handoff import Handoffs
from hexgen2.calibrate.handoff_fit import with_handoffs
from hexgen2.cost import CostModel, Efficiencies, Profile, default_efficiency
from hexgen2.specs.gpu import GpuType

FREE = (
    "compute",
    "attention",
    "memory",
    "kv",
    "layer_overhead_s",
    "layer_launch_s",
    "step_overhead_s",
    "prompt_overhead_s",
    "sequence_overhead_s",
    "request_overhead_s",
)


def fit_live(gpu: GpuType, measured: Sequence[Measured], handoffs: Sequence[Handoffs] = ()) -> Fit:
    """Begin at the type's default; links are fitted where a layout has some. ``handoffs``: between engines of
    which the sending or the receiving ones are of the type, the others left out.

    The overheads that are zero by default begin at a small time: parameters are fitted as logarithms.
    """
    default = default_efficiency(gpu)
    start = default.model_copy(
        update={
            "layer_launch_s": default.layer_overhead_s / 4,
            "prompt_overhead_s": default.step_overhead_s,
            "sequence_overhead_s": default.step_overhead_s / 100,
            "request_overhead_s": default.step_overhead_s,
        }
    )
    spread = any(stage.tp > 1 or stage.upstream for one in measured for stage in one.layout)
    free = (*FREE, "link") if spread else FREE
    fitted = fit(gpu.name, measured, start, free)
    profile = Profile(name="fit", source="", date="", engine="", gpus={gpu.name: fitted.efficiency})
    return with_handoffs(fitted, CostModel(measured[0].model, Efficiencies([profile])), handoffs)
