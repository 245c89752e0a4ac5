"""A Ray cluster of unlike nodes on this machine, each at an address of its own, and a way to lose them.

It lives in a process of its own, which ends with the tests' process:
`python tests/unlike_nodes.py` prints the cluster's address, obeys `kill NAME` and `add NAME` on its standard
input, and ends at the end of that. Names are also the plan's: `a` by a label, `b` by a custom resource, `c` by
its address alone.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

HOSTS = {"a": "127.0.0.2", "b": "127.0.0.3", "c": "127.0.0.4"}
NODES: dict[str, dict[str, Any]] = {
    "a": {"num_cpus": 2, "num_gpus": 2, "labels": {"hexgen2-node": "a"}},
    "b": {"num_cpus": 2, "num_gpus": 2, "resources": {"hexgen2-node:b": 1}},
    "c": {"num_cpus": 1},
}


class UnlikeNodes:
    """The tests' side of it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.address = self._answer()
        self.there = set(NODES)

    def kill(self, name: str) -> None:
        """The node dies without a word."""
        self._ask(f"kill {name}")
        self.there.discard(name)

    def add(self, name: str) -> None:
        """The node comes (back)."""
        self._ask(f"add {name}")
        self.there.add(name)

    def restore(self) -> None:
        """All nodes are there again."""
        for name in set(NODES) - self.there:
            self.add(name)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def _ask(self, command: str) -> None:
        assert self._process.stdin is not None
        print(command, file=self._process.stdin, flush=True)
        assert self._answer() == "done"

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        assert line, "the Ray cluster did not come up"
        return line


def main() -> None:
    import os

    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    # Ray talks on standard output; that is for the answers here.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})

    def add(name: str) -> Any:
        return cluster.add_node(node_ip_address=HOSTS[name], **NODES[name])

    nodes = {name: add(name) for name in NODES}
    print(cluster.address, file=answers, flush=True)
    for line in sys.stdin:
        command, name = line.split()
        if command == "kill":
            cluster.remove_node(nodes.pop(name), allow_graceful=False)
        else:
            nodes[name] = add(name)
        print("done", file=answers, flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()
