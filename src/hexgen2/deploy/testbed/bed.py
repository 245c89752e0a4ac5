"""A test bed that stands: built, used and taken down again."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from hexgen2.deploy.local import LocalLauncher
from hexgen2.deploy.spec import Deployment, ProcessSpec
from hexgen2.deploy.testbed import quotas, records
from hexgen2.deploy.testbed.wiring import PREFIX, UPLINK, Wiring, cores_of
from hexgen2.specs.cluster import Cluster
from hexgen2.specs.errors import InputError

ENTER = 'echo $$ > "$1/cgroup.procs" && shift && exec "$@"'
"""Into the group first: `ip netns exec` puts a /sys of its own over the one with the groups."""

ON_DEVICE = "VLLM::"
"""What the names of vLLM's processes that compute begin with (engine core, workers). The others of an engine,
its HTTP server above all, run on the host's processor, as beside a GPU."""

OUTSIDE = "outside"
"""The group of the process that builds the bed and of all that it starts: coordinator, client."""

DEVICE = "-device"
"""Ends the name of the group of a process's part that is on the device."""


def require_means() -> quotas.Controller:
    """What a bed needs of this machine; InputError (one line) where something is missing."""
    mend = "run it as root on a Linux machine with iproute2"
    if os.name != "posix" or not Path("/proc/self/ns/net").exists():
        raise InputError("test bed", "", "needs Linux's network namespaces", mend)
    if os.geteuid() != 0:
        raise InputError("test bed", "", "needs root for network namespaces and quotas", mend)
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            raise InputError("test bed", "", f"needs iproute2's `{tool}`, which is not installed", mend)
    controller = quotas.find_controller(Path("/proc/mounts").read_text())
    if controller is None:
        raise InputError("test bed", "", "needs a cgroup controller for the processor (cpu)", mend)
    return controller


class BedLauncher(LocalLauncher):
    """Runs placed processes: a bed has made their addresses, which are not this machine's own, and nobody else
    listens there."""

    async def _check(self, processes: Sequence[ProcessSpec]) -> None:
        pass


class Bed:
    """A cluster of CPU devices on this machine, inside a `with` block.

    Entering it clears what abandoned beds left, and builds namespaces and links; leaving it kills whatever
    still runs there and removes everything. Within, this process and what runs on the bed come before all else
    on the machine's processor, so that other work disturbs a measurement little. Raises InputError where this
    machine cannot do it.
    """

    def __init__(self, cluster: Cluster, folder: Path = records.FOLDER) -> None:
        self._cluster = cluster
        self._folder = folder
        self._controller = require_means()
        self._limits: dict[str, float] = {}

    def __enter__(self) -> Bed:
        records.sweep(self._folder)
        taken = {record.tag for record in records.kept(self._folder)}
        tag = next(tag for tag in iter(lambda: secrets.token_hex(2), "") if tag not in taken)
        self.wiring = Wiring(self._cluster, tag)
        groups = self._controller.root / f"{PREFIX}{tag}"
        started = records.start_tick(os.getpid())
        assert started is not None, "this process runs"
        self._record = records.Record(
            tag=tag,
            pid=os.getpid(),
            started=started,
            interfaces=(*self.wiring.cables(), self.wiring.bridge),
            namespaces=self.wiring.namespaces,
            groups=str(groups),
        )
        records.keep(self._record, self._folder)
        self._came_from = self._controller.group_of(Path("/proc/self/cgroup").read_text())
        try:
            outside = self._group(OUTSIDE)
            for group in (groups, outside):
                self._controller.favour(group)
            quotas.move([os.getpid()], outside)
            for command in self.wiring.setup():
                _run(command)
        except BaseException:
            self._clear()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._clear()

    @property
    def cluster(self) -> Cluster:
        """The cluster with the nodes' addresses."""
        return self.wiring.hosted()

    def place(self, deployment: Deployment) -> Deployment:
        """The same processes, each inside its node and in a group of its own, not limited yet.

        Engines load many times faster than they serve, so the quotas come when they are ready: `limit`.
        """
        self._limits.clear()
        processes = tuple(self._placed(process) for process in deployment.processes)
        return deployment.model_copy(update={"processes": processes})

    def limit(self) -> None:
        """Give what computes of every placed process the part of a core that its devices are.

        RuntimeError where nothing of a running process is known to compute: its device would have no limit.
        """
        core = quotas.pinned(self._limits, sorted(os.sched_getaffinity(0)))
        for name, cores in self._limits.items():
            engine, device = self._group(name), self._group(name + DEVICE)
            running = quotas.members(engine)
            computing = [pid for pid in running if _name(pid).startswith(ON_DEVICE)]
            if running and not computing and not quotas.members(device):
                raise RuntimeError(f"no process of {name} is named {ON_DEVICE}...: nothing to limit")
            quotas.move(computing, device)
            if name in core:
                quotas.pin(computing, core[name])
            # The host's part answers at once, as beside a GPU: it takes little, and what a device has to wait
            # for it is still within its turn.
            self._controller.favour(engine)
            self._controller.limit(device, cores)

    def inside(self, node: int, command: Sequence[str]) -> tuple[str, ...]:
        """A command as it is run in a node."""
        return ("ip", "netns", "exec", self.wiring.namespace(node), *command)

    def environment(self, node: int) -> dict[str, str]:
        """What processes in a node need so that their transfers take its links: namespaces share the machine's
        memory, which UCX would use otherwise."""
        return {
            "UCX_TLS": "tcp",
            "UCX_NET_DEVICES": ",".join(self.wiring.devices(node)),
            "GLOO_SOCKET_IFNAME": UPLINK,
        }

    def _placed(self, process: ProcessSpec) -> ProcessSpec:
        node = [one.name for one in self._cluster.nodes].index(process.node)
        folder = self._group(process.name)
        self._limits[process.name] = sum(cores_of(self._cluster.gpu_by_id[gpu].type) for gpu in process.gpus)
        argv = ("sh", "-c", ENTER, "sh", str(folder), *self.inside(node, process.argv))
        return process.model_copy(update={"argv": argv, "env": process.env | self.environment(node)})

    def _clear(self) -> None:
        """Leave the bed's groups, whose processes are killed; take the bed down."""
        quotas.move(quotas.members(self._group(OUTSIDE)), self._came_from)
        records.clear(self._record, self._folder)

    def _group(self, name: str) -> Path:
        return self._controller.make(f"{PREFIX}{self.wiring.tag}", name)


def _name(pid: int) -> str:
    """What a process calls itself; empty where it has ended."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it failed"])[-1]
        raise InputError(
            "test bed",
            " ".join(command),
            f"did not work ({reason})",
            "run it on a machine whose kernel has veth, bridge and tbf",
        )
