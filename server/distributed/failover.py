"""What a router does about replicas that are gone.

A request whose generator replica or engine dies is drawn once more, as in one process: what had finished stays, the
rest keeps its seeds, and the deadline goes on counting. There another engine is started for it; here Serve starts
another replica, or there is one more already, and all that is left to do is to wait for it.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from reranker.scorers.base import Scorer
from server.distributed.clients import RETRY_INTERVAL_S, RemoteGenerator, answer_soon
from server.errors import NotReadyError
from server.generation.base import Generator
from server.generation.supervisor import EngineSupervisor
from server.pipeline.best_of_n import BestOfN

SUCCESSOR_TIMEOUT_S = 120
"""Longest wait of a request for the replica after the one that died: Serve notices within seconds, and an engine starts
in tens of them. Whoever cannot wait so long sends a deadline."""


class FailoverGenerator(EngineSupervisor):
    """The generator deployment, whose replicas take one another's place."""

    def __init__(self, replicas: RemoteGenerator) -> None:
        self.model = replicas.model
        self._replicas = replicas

    @property
    def engine(self) -> Generator:
        return self._replicas

    async def successor(self, dead: Generator) -> Generator:
        """The deployment itself, once a replica of it could answer.

        Raises:
            NotReadyError: none could in time.
        """
        try:
            async with asyncio.timeout(SUCCESSOR_TIMEOUT_S):
                while True:
                    try:
                        await dead.check_ready()
                    except NotReadyError:
                        await asyncio.sleep(RETRY_INTERVAL_S)
                    else:
                        return dead
        except TimeoutError:
            raise NotReadyError("No generator replica took the place of the one that died; try again.") from None

    async def close(self) -> None:
        """Nothing is held here: the deployment ends with its application."""


class ReplicatedBestOfN(BestOfN):
    """The pipeline over both deployments, ready when each has a replica that answers; `ask_scorer` asks one."""

    def __init__(
        self, generator: Generator, scorers: Mapping[str, Scorer], ask_scorer: Callable[[], Awaitable[object]]
    ) -> None:
        super().__init__(generator, scorers)
        self._ask_scorer = ask_scorer

    async def check_ready(self) -> None:
        await super().check_ready()
        await answer_soon(self._ask_scorer, "scorer")
