"""From a plan to running processes: compile it to process specs, then launch those."""

from hexgen2.deploy.compile import compile_groups, compile_plan, coordinator_config, used_nodes
from hexgen2.deploy.emulated import compile_emulated, compile_emulated_groups, emulated_processes
from hexgen2.deploy.environment import check_engine
from hexgen2.deploy.groups import RunningGroups
from hexgen2.deploy.kv_transfer import connector_of
from hexgen2.deploy.launcher import (
    EngineFailed,
    GroupLauncher,
    Launcher,
    ProcessExit,
    Progress,
    ProgressCallback,
)
from hexgen2.deploy.local import LocalLauncher
from hexgen2.deploy.options import EngineOptions
from hexgen2.deploy.ports import PortSource, counted_ports, free_ports, require_free, require_own
from hexgen2.deploy.site import Address, HostSite, Site
from hexgen2.deploy.spec import Deployment, ProcessSpec
from hexgen2.deploy.supervisor import GroupEvent, RestartPolicy, Supervisor

__all__ = [
    "Address",
    "Deployment",
    "EngineFailed",
    "EngineOptions",
    "GroupEvent",
    "GroupLauncher",
    "HostSite",
    "Launcher",
    "LocalLauncher",
    "PortSource",
    "ProcessExit",
    "ProcessSpec",
    "Progress",
    "ProgressCallback",
    "RestartPolicy",
    "RunningGroups",
    "Site",
    "Supervisor",
    "check_engine",
    "compile_emulated",
    "compile_emulated_groups",
    "compile_groups",
    "compile_plan",
    "connector_of",
    "coordinator_config",
    "counted_ports",
    "emulated_processes",
    "free_ports",
    "require_free",
    "require_own",
    "used_nodes",
]
