"""Watches a plan that is served, and changes it with the least disturbance when the load or the fleet does."""

from hexgen2.controller.apply import Engines
from hexgen2.controller.assess import BOTH, Flipping
from hexgen2.controller.control import Controller, Mode, Watching
from hexgen2.controller.decide import Decision, Policy

__all__ = ["BOTH", "Controller", "Decision", "Engines", "Flipping", "Mode", "Policy", "Watching"]
