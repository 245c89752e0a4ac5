"""What people run, and the paper's ablations, as solvers over the same cost model and engine profiles."""

from hexgen2.scheduler.baselines.ablations import genetic, random_swap
from hexgen2.scheduler.baselines.colocated import colocated, hexgen
from hexgen2.scheduler.baselines.distserve import distserve, distserve_pairs

__all__ = ["colocated", "distserve", "distserve_pairs", "genetic", "hexgen", "random_swap"]
