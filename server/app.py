"""The HTTP application: its routes and middleware.

A completion passes, from the outside in: `http.request_log` (id, access log) -> `http.access` (listener, key, rate) ->
`http.completions`: read the body (`http.body`) and validate it (`schemas`) -> wait for admission (`http.admission`) ->
`BestOfN.run` (`pipeline`) -> the reply (`http.response_builder`) or its events (`http.sse`). A failure anywhere is an
`NbestError`, and `http.errors` sends it as OpenAI's error envelope.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from server.config import Settings
from server.errors import NbestError
from server.http import openapi, playground
from server.http.access import AccessMiddleware
from server.http.admin import AdminEndpoints
from server.http.admission import Admission, Limits
from server.http.api_keys import Keys
from server.http.body import BodyReader
from server.http.completions import CompletionEndpoints
from server.http.disconnect import ClientGoneError
from server.http.errors import ErrorReplies, on_client_gone
from server.http.lifespan import Lifecycle
from server.http.request_log import RequestRecorder
from server.http.scoring import ScoreEndpoint
from server.http.status import StatusEndpoints
from server.observability.metrics import Metrics
from server.pipeline.best_of_n import BestOfN
from server.schemas.requests import (
    AdapterRequest,
    ChatCompletionRequest,
    CompletionRequest,
    ScoreRequest,
    default_stopping,
)
from server.schemas.responses import (
    AdapterReply,
    ChatCompletion,
    ChatCompletionChunk,
    ModelList,
    ScoreReply,
    Status,
    TextCompletion,
    TextCompletionChunk,
)

if TYPE_CHECKING:
    from server.observability.tracing import Tracing


def create_app(
    start: Callable[[], AbstractAsyncContextManager[BestOfN]],
    settings: Settings,
    metrics: Metrics,
    *,
    on_start_failure: Callable[[BaseException], None] | None = None,
    exposition: Callable[[], Awaitable[bytes]] | None = None,
    tracing: "Tracing | None" = None,
) -> FastAPI:
    """The server over the pipeline that `start` opens.

    HTTP answers before the pipeline is ready: the pipeline is opened in the background and closed at shutdown.
    `on_start_failure` is called with the error of a start that failed. `exposition` returns the text of `/metrics`
    where other processes count too; by default it is that of `metrics`. With `tracing` every request has a span.
    After `app.state.drain()` no new work is accepted.

    Raises:
        server.config.ConfigError: a setting that is read only here is invalid.
    """
    default_stopping(settings, settings.default_best_of, n=1)
    lifecycle = Lifecycle(start, on_start_failure)
    replies = ErrorReplies(metrics)
    keys = Keys(settings.keys_file) if settings.keys_file else None

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with lifecycle.running():
            yield

    app = openapi.DocumentedApp(
        needs_key=keys is not None,
        lifespan=lifespan,
        exception_handlers={
            NbestError: replies,
            HTTPException: replies,
            ClientGoneError: on_client_gone,
            Exception: replies,
        },
    )
    app.state.drain = lifecycle.drain
    app.add_middleware(AccessMiddleware, settings=settings, keys=keys, refuse=replies.refusal)
    body, admission = BodyReader(settings), Admission(Limits.of(settings), metrics)
    _add_model_routes(app, lifecycle, settings, metrics, body, admission)
    _add_status_routes(app, StatusEndpoints(lifecycle, metrics, exposition))
    if settings.adapter_root is not None:
        app.add_api_route(
            "/admin/adapter",
            AdminEndpoints(lifecycle, settings.adapter_root, body).load_adapter,
            methods=["POST"],
            responses=openapi.replies(AdapterReply, 400, 403, 408, 413, 429, 500, 503),
            openapi_extra=openapi.inline_json_body(AdapterRequest),
        )
    # These wrap the whole middleware stack, so that the reply to an unexpected error is recorded too.
    stack: ASGIApp = app.build_middleware_stack()
    if tracing is not None:
        from server.http.tracing import RequestSpans

        stack = RequestSpans(stack, tracing.tracer)
    app.middleware_stack = RequestRecorder(stack, metrics)
    return app


def _add_model_routes(
    app: FastAPI, lifecycle: Lifecycle, settings: Settings, metrics: Metrics, body: BodyReader, admission: Admission
) -> None:
    """The routes that use the models."""
    completions = CompletionEndpoints(lifecycle, settings, metrics, body, admission)
    score = ScoreEndpoint(lifecycle, settings, metrics, body, admission)
    app.add_api_route(
        "/v1/chat/completions",
        completions.chat_completions,
        methods=["POST"],
        responses=openapi.replies(ChatCompletion, 400, 404, 408, 413, 429, 500, 503, 504, chunk=ChatCompletionChunk),
        openapi_extra=openapi.json_body(ChatCompletionRequest),
    )
    app.add_api_route(
        "/v1/completions",
        completions.completions,
        methods=["POST"],
        responses=openapi.replies(TextCompletion, 400, 404, 408, 413, 429, 500, 503, 504, chunk=TextCompletionChunk),
        openapi_extra=openapi.json_body(CompletionRequest),
    )
    app.add_api_route(
        "/v1/score",
        score.score,
        methods=["POST"],
        responses=openapi.replies(ScoreReply, 400, 408, 413, 429, 500, 503),
        openapi_extra=openapi.json_body(ScoreRequest),
    )


def _add_status_routes(app: FastAPI, status: StatusEndpoints) -> None:
    """The playground, and the routes for models, health, readiness and metrics."""
    for path, file in playground.FILES.items():
        app.add_api_route(
            path,
            playground.endpoint_of(file),
            response_class=Response,
            responses={200: openapi.PLAYGROUND_PAGE},
            openapi_extra={"security": []},
            include_in_schema=path == playground.ROOT,
        )
    app.add_api_route("/v1/models", status.models, responses=openapi.replies(ModelList, 429, 503))
    app.add_api_route(
        "/health", status.health, responses=openapi.replies(Status, needs_key=False), openapi_extra={"security": []}
    )
    app.add_api_route("/ready", status.ready, responses=openapi.replies(Status, 503))
    app.add_api_route(
        "/metrics",
        status.prometheus,
        response_class=Response,
        responses={**openapi.error_replies(401), 200: openapi.PROMETHEUS_TEXT},
    )
