"""How a router continues when a replica dies.

A request whose generator replica or engine dies is sampled once more, as in a server of one process: finished
candidates are kept, the others keep their seeds, and the deadline is unchanged. In one process the supervisor starts
another engine. Here Serve starts another replica, or a second replica runs already, so the router only waits for one.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from reranker.scorers.base import Scorer
from server.distributed.clients import RETRY_INTERVAL_S, RemoteGenerator, call_ready_replica
from server.errors import NotReadyError
from server.generation.base import Generator
from server.generation.supervisor import EngineSupervisor
from server.pipeline.best_of_n import BestOfN

REPLACEMENT_TIMEOUT_S = 120
"""Longest wait of a request for another replica after its replica died. Serve notices a death within seconds, and an
engine starts within tens of seconds. A client that cannot wait that long sends a deadline."""


class FailoverGenerator(EngineSupervisor):
    """The generator deployment, whose replicas replace one another."""

    def __init__(self, replicas: RemoteGenerator) -> None:
        self.model = replicas.model
        self._replicas = replicas

    @property
    def engine(self) -> Generator:
        return self._replicas

    async def next_engine(self, dead: Generator) -> Generator:
        """Returns the deployment itself, once one of its replicas is ready.

        Raises:
            NotReadyError: no replica was ready within `REPLACEMENT_TIMEOUT_S`.
        """
        try:
            async with asyncio.timeout(REPLACEMENT_TIMEOUT_S):
                while True:
                    try:
                        await dead.check_ready()
                    except NotReadyError:
                        await asyncio.sleep(RETRY_INTERVAL_S)
                    else:
                        return dead
        except TimeoutError:
            raise NotReadyError("No generator replica replaced the one that died; try again.") from None

    async def close(self) -> None:
        """Nothing to free: the deployment ends with its application."""


class ReplicatedBestOfN(BestOfN):
    """The pipeline over both deployments: ready when each has a ready replica; `call_scorer` calls a scorer replica."""

    def __init__(
        self, generator: Generator, scorers: Mapping[str, Scorer], call_scorer: Callable[[], Awaitable[object]]
    ) -> None:
        super().__init__(generator, scorers)
        self._call_scorer = call_scorer

    async def check_ready(self) -> None:
        await super().check_ready()
        await call_ready_replica(self._call_scorer, "scorer")
