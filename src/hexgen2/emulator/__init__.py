"""An engine without a GPU: speaks vLLM's HTTP protocol, in the time that a `Timing` says."""

from hexgen2.emulator.faults import Fault
from hexgen2.emulator.server import EmulatedEngine, EmulatorConfig
from hexgen2.emulator.timing import LinearTiming, Timing

__all__ = ["EmulatedEngine", "EmulatorConfig", "Fault", "LinearTiming", "Timing"]
