"""Several processes that serve, and one that owns what they share.

The owner is the process that runs the `Coordinator`. It knows the engines, gives the places, counts, and
answers whatever is not generation. Each worker accepts clients and carries tokens; for every request it asks
the owner over a socket pair: for a place (one message there and one back), for a slot of the decode engine, for
another path where one failed. So shares, limits, queues, circuit breakers and metrics are those of one
coordinator, not of each worker. A worker that dies takes its own requests with it and gives their places back.
"""

from hexgen2.coordinator.workers.pool import Workers, listening
from hexgen2.coordinator.workers.settings import WorkerSettings

__all__ = ["WorkerSettings", "Workers", "listening"]
