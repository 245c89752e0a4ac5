"""Discrete-event simulation of a plan under load, at the cost model's speed."""

from hexgen2.simulator.load import Requests, offline, poisson, replay
from hexgen2.simulator.result import SimulationResult, Timeline
from hexgen2.simulator.run import simulate
from hexgen2.simulator.trace import chrome_trace

__all__ = [
    "Requests",
    "SimulationResult",
    "Timeline",
    "chrome_trace",
    "offline",
    "poisson",
    "replay",
    "simulate",
]
