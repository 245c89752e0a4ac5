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
    still runs there and removes everything. Raises InputError where this machine cannot do it.
    """

    def __init__(self, cluster: Cluster, folder: Path = records.FOLDER) -> None:
        self._cluster = cluster
        self._folder = folder
        self._controller = require_means()
        self._limits: dict[Path, float] = {}

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
        try:
            for command in self.wiring.setup():
                _run(command)
        except BaseException:
            records.clear(self._record, self._folder)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        records.clear(self._record, self._folder)

    @property
    def cluster(self) -> Cluster:
        """The cluster with the nodes' addresses."""
        return self.wiring.hosted()

    def place(self, deployment: Deployment) -> Deployment:
        """The same processes, each inside its node and in a group of its own, which has no limit yet.

        Engines load many times faster than they serve, so the quotas come when they are ready: `limit`.
        """
        self._limits.clear()
        processes = tuple(self._placed(process) for process in deployment.processes)
        return deployment.model_copy(update={"processes": processes})

    def limit(self) -> None:
        """Give every placed process the part of the processor that its devices are."""
        for folder, cores in self._limits.items():
            self._controller.limit(folder, cores)

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
        folder = self._controller.make(f"{PREFIX}{self.wiring.tag}", process.name)
        self._controller.limit(folder, None)  # the group may be that of an earlier deployment
        self._limits[folder] = sum(cores_of(self._cluster.gpu_by_id[gpu].type) for gpu in process.gpus)
        argv = ("sh", "-c", ENTER, "sh", str(folder), *self.inside(node, process.argv))
        return process.model_copy(update={"argv": argv, "env": process.env | self.environment(node)})


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
