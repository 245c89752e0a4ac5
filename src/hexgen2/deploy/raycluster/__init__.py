"""Plans on a Ray cluster: its nodes found, processes run on them, nodes watched. Ray is imported when used."""

from hexgen2.deploy.raycluster.connection import RayCluster, connected, import_ray
from hexgen2.deploy.raycluster.launcher import RayLauncher
from hexgen2.deploy.raycluster.nodes import Places, RayNode, places
from hexgen2.deploy.raycluster.site import RayPorts, RaySite
from hexgen2.deploy.raycluster.watch import NodeWatch

__all__ = [
    "NodeWatch",
    "Places",
    "RayCluster",
    "RayLauncher",
    "RayNode",
    "RayPorts",
    "RaySite",
    "connected",
    "import_ray",
    "places",
]
