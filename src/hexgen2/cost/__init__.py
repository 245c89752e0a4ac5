"""What serving costs: compute, memory and network of a layout, and its capacity in each role. All pure."""

from hexgen2.cost.capacity import ColocatedCapacity, DecodeCapacity, PrefillCapacity
from hexgen2.cost.layout import Layout, PlacedStage, Placement, StageShape, shape
from hexgen2.cost.memory import Settings
from hexgen2.cost.moments import Moments
from hexgen2.cost.profile import Efficiencies, Efficiency, Profile, default_efficiency, parse_profile
from hexgen2.cost.replica import CostModel
from hexgen2.cost.transfer import (
    Loads,
    Resource,
    kv_loads,
    resources,
    route_capacity,
    transfer_seconds,
)

__all__ = [
    "ColocatedCapacity",
    "CostModel",
    "DecodeCapacity",
    "Efficiencies",
    "Efficiency",
    "Layout",
    "Loads",
    "Moments",
    "PlacedStage",
    "Placement",
    "PrefillCapacity",
    "Profile",
    "Resource",
    "Settings",
    "StageShape",
    "default_efficiency",
    "kv_loads",
    "parse_profile",
    "resources",
    "route_capacity",
    "shape",
    "transfer_seconds",
]
