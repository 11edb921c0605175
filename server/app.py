"""The HTTP surface: the routes, and what they share.

A completion goes: read the body and validate it (wire, schemas) -> plan -> `BestOfN.run` -> its reply (replies) or its
events (streaming). Whatever fails on the way is an `NbestError` and leaves in OpenAI's envelope.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp

from reranker.candidate import Candidate, Prompt
from reranker.scorers.base import Scorer, Scores, ScoringError
from server.config import Settings
from server.errors import (
    BadRequestError,
    ClientTimeoutError,
    NbestError,
    NotFoundError,
    NotReadyError,
    RewardError,
)
from server.generation.base import Outcome
from server.http import openapi, playground
from server.http.access import ACCOUNT, AccessMiddleware
from server.http.admission import Admission, Limits, prompt_tokens, requested_tokens, text_tokens
from server.http.api_keys import Account, Keys
from server.http.body import read_body
from server.http.disconnect import ClientGoneError, until_disconnect
from server.http.errors import ErrorReplies, json_response, on_client_gone
from server.http.lifespan import Lifecycle
from server.http.request_log import RequestRecorder
from server.http.response_builder import ChatReply, Reply, TextReply
from server.http.sse import EventStream, News, stream
from server.observability.metrics import Metrics
from server.observability.request_context import TokenCost, note_tokens
from server.pipeline import blockwise
from server.pipeline.best_of_n import BestOfN, BestOfNRequest, BestOfNResult
from server.schemas.requests import (
    AdapterRequest,
    ChatCompletionRequest,
    CompletionRequest,
    GenerationRequest,
    ScoreRequest,
    default_stopping,
)
from server.schemas.responses import (
    AdapterReply,
    ChatCompletion,
    ChatCompletionChunk,
    Model,
    ModelList,
    Score,
    ScoreReply,
    ScoreUsage,
    Status,
    TextCompletion,
    TextCompletionChunk,
)
from server.schemas.strict import Request as RequestModel
from server.schemas.strict import parse

API_VERSION = "1"

if TYPE_CHECKING:
    from server.observability.tracing import Tracing

log = getLogger("nbest")


def create_app(
    start: Callable[[], AbstractAsyncContextManager[BestOfN]],
    settings: Settings,
    metrics: Metrics,
    *,
    on_start_failure: Callable[[BaseException], None] | None = None,
    exposition: Callable[[], Awaitable[bytes]] | None = None,
    tracing: "Tracing | None" = None,
) -> FastAPI:
    """The server over whatever pipeline `start` opens.

    HTTP is up before the pipeline is, which is entered in the background and left at shutdown. `on_start_failure`
    hears of a start that failed, so that whoever runs the process can end it. `exposition` is what `/metrics` tells
    where other processes count too; by default it tells `metrics`. With `tracing` every request has a span.
    After `app.state.drain()` no new work is taken.

    Raises:
        server.config.ConfigError: a setting that is read only here cannot be used.
    """
    default_stopping(settings, settings.default_best_of, n=1)
    lifecycle = Lifecycle(start, on_start_failure)
    endpoints = Endpoints(lifecycle, settings, metrics, exposition)
    replies = ErrorReplies(metrics)
    keys = Keys(settings.keys_file) if settings.keys_file else None

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with lifecycle.running():
            yield

    app = _DocumentedApp(
        title="nbest",
        summary="Best-of-N inference with reward reranking, OpenAI-compatible.",
        version=API_VERSION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        exception_handlers={
            NbestError: replies,
            HTTPException: replies,
            ClientGoneError: on_client_gone,
            Exception: replies,
        },
    )
    app.state.drain = lifecycle.drain
    app.security = openapi.security(required=keys is not None)
    app.add_middleware(AccessMiddleware, settings=settings, keys=keys, refuse=replies.refusal)
    app.add_api_route(
        "/v1/chat/completions",
        endpoints.chat_completions,
        methods=["POST"],
        responses=openapi.replies(ChatCompletion, 400, 404, 408, 413, 429, 500, 503, 504, chunk=ChatCompletionChunk),
        openapi_extra=openapi.takes(ChatCompletionRequest),
    )
    app.add_api_route(
        "/v1/completions",
        endpoints.completions,
        methods=["POST"],
        responses=openapi.replies(TextCompletion, 400, 404, 408, 413, 429, 500, 503, 504, chunk=TextCompletionChunk),
        openapi_extra=openapi.takes(CompletionRequest),
    )
    app.add_api_route(
        "/v1/score",
        endpoints.score,
        methods=["POST"],
        responses=openapi.replies(ScoreReply, 400, 408, 413, 429, 500, 503),
        openapi_extra=openapi.takes(ScoreRequest),
    )
    for path, file in playground.FILES.items():
        app.add_api_route(
            path,
            serving(file),
            response_class=Response,
            responses={200: openapi.PAGE},
            openapi_extra={"security": []},
            include_in_schema=path == playground.ROOT,
        )
    app.add_api_route("/v1/models", endpoints.models, responses=openapi.replies(ModelList, 429, 503))
    app.add_api_route(
        "/health",
        endpoints.health,
        responses=openapi.replies(Status, needs_key=False),
        openapi_extra={"security": []},
    )
    app.add_api_route("/ready", endpoints.ready, responses=openapi.replies(Status, 503))
    app.add_api_route(
        "/metrics",
        endpoints.prometheus,
        response_class=Response,
        responses={**openapi.errors(401), 200: openapi.PROMETHEUS_TEXT},
    )
    if settings.adapter_root is not None:
        app.add_api_route(
            "/admin/adapter",
            endpoints.load_adapter,
            methods=["POST"],
            responses=openapi.replies(AdapterReply, 400, 403, 408, 413, 429, 500, 503),
            openapi_extra=openapi.takes_flat(AdapterRequest),
        )
    # Outermost, where the reply to a fault of ours passes too; what is added as middleware stands inside of that.
    stack: ASGIApp = app.build_middleware_stack()
    if tracing is not None:
        from server.http.tracing import RequestSpans

        stack = RequestSpans(stack, tracing.tracer)
    app.middleware_stack = RequestRecorder(stack, metrics)
    return app


class Endpoints:
    """One method a route."""

    def __init__(
        self,
        lifecycle: Lifecycle,
        settings: Settings,
        metrics: Metrics,
        exposition: Callable[[], Awaitable[bytes]] | None = None,
    ) -> None:
        self._lifecycle = lifecycle
        self._settings = settings
        self._metrics = metrics
        self._exposition = exposition
        self._admission = Admission(Limits.of(settings), metrics)
        self._created = int(time.time())

    async def chat_completions(self, request: Request) -> Response:
        """The best of N answers to a conversation."""
        asked = await self._read(request, ChatCompletionRequest)
        return await self._complete(request, asked, ChatReply(asked))

    async def completions(self, request: Request) -> Response:
        """The best of N continuations of a text."""
        asked = await self._read(request, CompletionRequest)
        return await self._complete(request, asked, TextReply(asked))

    async def score(self, request: Request) -> Response:
        """What a reward model thinks of given candidates."""
        asked = await self._read(request, ScoreRequest)
        scorer = self._lifecycle.pipeline.scorer(asked.reward_model)
        prompt, candidates = asked.to_prompt_and_candidates(self._settings)
        account: Account = request.scope[ACCOUNT]
        scores = await until_disconnect(request.receive, self._score(account, scorer, prompt, candidates))
        self._metrics.observe_scored_tokens(scores.scored_tokens)
        note_tokens(TokenCost(scored=scores.scored_tokens))
        return json_response(
            ScoreReply(
                model=scorer.name,
                data=[Score(index=index, score=reward) for index, reward in enumerate(scores.rewards_N)],
                usage=ScoreUsage(
                    prompt_tokens=scores.scored_tokens,
                    total_tokens=scores.scored_tokens,
                    prompt_tokens_cut=scores.prompt_tokens_cut,
                ),
            )
        )

    async def load_adapter(self, request: Request) -> Response:
        """Serves a LoRA adapter from now on; requests under way keep the weights they began with."""
        asked = await self._read(request, AdapterRequest)
        path = below(self._settings.adapter_root, asked.path)
        version = await self._lifecycle.pipeline.generator.load_adapter(str(path))
        log.warning("The adapter %s is served now, version %s.", path, version)
        return json_response(AdapterReply(path=str(path), version=version))

    async def models(self) -> Response:
        """The served policy and the reward models beside it."""
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
        """Whether the process is alive; an engine that is starting is no reason to restart it."""
        return json_response(Status(status="ok"))

    async def ready(self) -> Response:
        """Whether a request sent now would be answered."""
        await self._lifecycle.pipeline.check_ready()
        return json_response(Status(status="ready"))

    async def prometheus(self) -> Response:
        """The metrics, for Prometheus to scrape."""
        try:
            await self._lifecycle.pipeline.check_ready()
            self._metrics.observe_ready(True)
        except NotReadyError:
            self._metrics.observe_ready(False)
        told = self._metrics.render() if self._exposition is None else await self._exposition()
        return Response(told, media_type=self._metrics.content_type)

    async def _read(self, request: Request, model: type[RequestModel]) -> RequestModel:
        try:
            async with asyncio.timeout(self._settings.client_timeout_s):
                body = await read_body(request.stream(), request.headers, self._settings.max_body_bytes)
        except TimeoutError:
            raise ClientTimeoutError(
                f"The body did not arrive within {self._settings.client_timeout_s:g} s; send it faster, or shorten it."
            ) from None
        except ClientDisconnect:
            raise ClientGoneError from None
        return parse(body, model)

    async def _score(self, account: Account, scorer: Scorer, prompt: Prompt, candidates: Sequence[Candidate]) -> Scores:
        """Scores given candidates when it is their turn."""
        tokens = prompt_tokens(prompt) + sum(text_tokens(len(one.text)) for one in candidates)
        with account.spending(tokens) as spending:
            async with self._admission.turn(len(candidates), tokens):
                try:
                    scores = await scorer.score(prompt, candidates)
                except ScoringError as error:
                    self._metrics.observe_reward_failure("error")
                    raise RewardError(f"The reward model failed: {error}. Try again.") from error
            spending.tokens = scores.scored_tokens
        return scores

    async def _complete(self, request: Request, asked: GenerationRequest, reply: Reply) -> Response:
        plan = asked.to_request(self._settings)
        pipeline = self._lifecycle.pipeline
        _check_served(pipeline, asked.model, plan.reward_model)
        run = partial(self._run, request.scope[ACCOUNT], pipeline, plan)
        if asked.stream:
            events = stream(run, reply, plan.best_of, grows=plan.best_of == 1 or plan.strategy == "blockwise")
            return EventStream(await until_disconnect(request.receive, anext(events)), events)
        return json_response(reply.whole(await until_disconnect(request.receive, run())))

    async def _run(
        self,
        account: Account,
        pipeline: BestOfN,
        plan: BestOfNRequest,
        listener: Callable[[News], None] | None = None,
    ) -> BestOfNResult:
        """Runs the plan when it is its turn, and counts what becomes of it.

        The listener is there where the answer is streamed.
        """
        tokens = requested_tokens(plan)
        with account.spending(tokens) as spending:
            async with self._admission.turn(plan.at_once, tokens, plan.deadline_s) as queued_s:
                if plan.strategy == "blockwise":
                    run_block = partial(self._draw, pipeline)
                    result = await blockwise.answer(run_block, plan, listener, queued_s)
                else:
                    result = await self._draw(pipeline, plan, listener, queued_s=queued_s)
            spending.tokens = result.prompt_tokens + result.generated_tokens
        self._metrics.observe_answer(result)
        note_tokens(TokenCost(result.prompt_tokens, result.generated_tokens, result.scored_tokens))
        return result

    async def _draw(
        self,
        pipeline: BestOfN,
        plan: BestOfNRequest,
        listener: Callable[[News], None] | None = None,
        *,
        queued_s: float,
    ) -> BestOfNResult:
        """Runs the plan and counts its candidates."""
        with self._metrics.candidates(plan.best_of, plan.sampling.begun_tokens) as tally:

            def heard(outcome: Outcome) -> None:
                tally(outcome)
                if listener is not None:
                    listener(outcome)

            try:
                result = await pipeline.run(
                    plan, heard, listener, stream_partial=listener is not None, queued_s=queued_s
                )
            except RewardError:
                self._metrics.observe_reward_failure("error")
                raise
            tally.not_drawn(result.not_drawn)
        return result


class _DocumentedApp(FastAPI):
    """Adds to the OpenAPI document the models that the routes read and stream by hand, and the keys."""

    security: list[dict[str, Any]]

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            document = super().openapi()
            document["components"]["schemas"].update(openapi.hand_read_schemas())
            document["components"]["securitySchemes"] = openapi.SECURITY_SCHEMES
            document["security"] = self.security
        return super().openapi()


def below(root: Path | None, path: str) -> Path:
    """The path, from `root` where it is not absolute.

    Raises:
        BadRequestError: it leads elsewhere, by whatever links.
    """
    if root is not None and "\0" not in path and (root / path).resolve().is_relative_to(root.resolve()):
        return root / path
    raise BadRequestError("The adapter is not below --adapter-root; move it there.", param="path")


def serving(file: playground.File) -> Callable[[], Awaitable[Response]]:
    """The endpoint of one file of the page."""

    async def page() -> Response:
        """The playground, a page that shows best-of-N at work."""
        return Response(file.content, media_type=file.media_type, headers=playground.HEADERS)

    return page


def _check_served(pipeline: BestOfN, model: str, reward_model: str | None) -> None:
    if model != pipeline.generator.model:
        raise NotFoundError(
            f"The model {model!r} is not served here; ask for {pipeline.generator.model}.", param="model"
        )
    try:
        pipeline.scorer(reward_model)
    except BadRequestError as error:
        raise BadRequestError(error.message, param="nbest.reward_model") from error
