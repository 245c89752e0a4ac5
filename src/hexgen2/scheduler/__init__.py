"""From a cluster, a model and a load to a plan: partition, layouts, flow, refinement."""

from hexgen2.scheduler.engines import PROFILES, EngineProfile, engine_profile
from hexgen2.scheduler.problem import Problem, Progress
from hexgen2.scheduler.schedule import SOLVERS, schedule

__all__ = ["PROFILES", "SOLVERS", "EngineProfile", "Problem", "Progress", "engine_profile", "schedule"]
