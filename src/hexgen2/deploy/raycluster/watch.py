"""Which nodes of a plan live, as Ray says and as their actors show."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

from hexgen2.deploy.raycluster.connection import RayCluster, awaited
from hexgen2.deploy.raycluster.nodes import Places, RayNode, places
from hexgen2.specs.cluster import Cluster

log = logging.getLogger(__name__)

LOOK_S = 1.0
ANSWER_S = 5.0
HELD_UP_S = 10.0


class NodeWatch:
    """Follows the nodes of a cluster file in a Ray cluster.

    Ray takes about 15 s to declare a node dead. Before that a node is doubted whose actor does not answer, and
    a node in doubt counts as gone until it runs a small task again.
    """

    def __init__(self, ray: RayCluster, cluster: Cluster) -> None:
        self._ray = ray
        self._cluster = cluster
        self._own = ray.own
        self._doubted: dict[str, RayNode] = {}
        self.places: Places = places(cluster, ray.nodes(), self._own)

    def alive(self, node: str) -> bool:
        """Whether a node of the plan is there."""
        found = self.places.found.get(node)
        return found is not None and found.id not in self._doubted

    def states(self) -> Mapping[str, bool]:
        """The same for every node of the cluster file."""
        return {node.name: self.alive(node.name) for node in self._cluster.nodes}

    def doubt(self, node: RayNode) -> None:
        """Something on this node does not answer any more."""
        self._doubted[node.id] = node

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            await asyncio.sleep(LOOK_S)
            asked = asyncio.create_task(asyncio.to_thread(self._ray.nodes))
            # A question that hangs is waited for: each holds a thread, and there are few.
            while not (await asyncio.wait((asked,), timeout=HELD_UP_S))[0]:
                log.warning("Ray does not answer which nodes live")
            try:
                nodes = asked.result()
            except self._ray.ray.exceptions.RayError as error:
                log.warning("Ray does not say which nodes live: %s", error)
                continue
            self.places = places(self._cluster, nodes, self._own)
            there = {node.id for node in nodes}
            # What Ray knows to be dead needs no doubt.
            doubted = [node for node in self._doubted.values() if node.id in there]
            answers = await asyncio.gather(*map(self._answers, doubted))
            trusted = {node.id for node, answered in zip(doubted, answers, strict=True) if answered}
            for node_id in [one for one in self._doubted if one in trusted or one not in there]:
                del self._doubted[node_id]

    async def _answers(self, node: RayNode) -> bool:
        try:
            await awaited(self._ray.call(node, _here), ANSWER_S)
        except (TimeoutError, self._ray.ray.exceptions.RayError):
            return False
        return True


def _here() -> bool:
    return True
