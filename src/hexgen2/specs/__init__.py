"""The ground floor: what a cluster, a model, a workload and a plan are. No I/O at import, no framework."""

from hexgen2.specs.cluster import Cluster, Gpu, Node, load_cluster, parse_cluster
from hexgen2.specs.errors import InputError
from hexgen2.specs.gpu import GIB, GpuType, Link, weakest
from hexgen2.specs.model import MLA, Model, MoE
from hexgen2.specs.plan import Group, Plan, Role, Route, Stage, load_plan, parse_plan
from hexgen2.specs.workload import Lengths, Marginals, Workload

__all__ = [
    "GIB",
    "MLA",
    "Cluster",
    "Gpu",
    "GpuType",
    "Group",
    "InputError",
    "Lengths",
    "Link",
    "Marginals",
    "MoE",
    "Model",
    "Node",
    "Plan",
    "Role",
    "Route",
    "Stage",
    "Workload",
    "load_cluster",
    "load_plan",
    "parse_cluster",
    "parse_plan",
    "weakest",
]
