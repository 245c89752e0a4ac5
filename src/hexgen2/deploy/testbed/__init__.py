"""A mixed cluster on one machine: nodes as network namespaces, links with a rate, devices as parts of a core.

Linux and root only. `Bed` builds it and takes it down; `benchmarks/testbed.py` measures with it.
"""

from hexgen2.deploy.testbed.bed import Bed, BedLauncher, require_means
from hexgen2.deploy.testbed.records import sweep
from hexgen2.deploy.testbed.wiring import Wiring, cores_of

__all__ = ["Bed", "BedLauncher", "Wiring", "cores_of", "require_means", "sweep"]
