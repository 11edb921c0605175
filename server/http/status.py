"""The endpoints for models, health, readiness and metrics: `/v1/models`, `/health`, `/ready` and `/metrics`."""

import time
from collections.abc import Awaitable, Callable

from fastapi import Response

from server.errors import NotReadyError
from server.http.errors import json_response
from server.http.lifespan import Lifecycle
from server.observability.metrics import Metrics
from server.schemas.responses import Model, ModelList, Status


class StatusEndpoints:
    """Endpoints that run no model.

    `exposition` returns the text of `/metrics` where other processes count too; by default it is that of `metrics`.
    """

    def __init__(
        self, lifecycle: Lifecycle, metrics: Metrics, exposition: Callable[[], Awaitable[bytes]] | None = None
    ) -> None:
        self._lifecycle = lifecycle
        self._metrics = metrics
        self._exposition = exposition
        self._created = int(time.time())

    async def models(self) -> Response:
        """Lists the served policy and its reward models."""
        pipeline = self._lifecycle.pipeline
        served = Model(
            id=pipeline.generator.model,
            object="model",
            created=self._created,
            owned_by="nbest",
            reward_models=list(pipeline.scorers),
        )
        return json_response(ModelList(object="list", data=[served]))

    async def health(self) -> Response:
        """Liveness probe: the process answers. It is ok while the engine starts, so nothing restarts the process."""
        return json_response(Status(status="ok"))

    async def ready(self) -> Response:
        """Readiness probe: whether a request sent now would be answered."""
        await self._lifecycle.pipeline.check_ready()
        return json_response(Status(status="ready"))

    async def prometheus(self) -> Response:
        """The metrics, for Prometheus to scrape."""
        try:
            await self._lifecycle.pipeline.check_ready()
            self._metrics.observe_ready(True)
        except NotReadyError:
            self._metrics.observe_ready(False)
        exposition = self._metrics.render() if self._exposition is None else await self._exposition()
        return Response(exposition, media_type=self._metrics.content_type)
