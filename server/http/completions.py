"""`POST /v1/chat/completions` and `POST /v1/completions`: read, admit, run, reply."""

from functools import partial

from fastapi import Request, Response

from server.config import Settings
from server.errors import BadRequestError, NotFoundError
from server.http.access import ACCOUNT
from server.http.admission import Admission, requested_tokens
from server.http.api_keys import Account
from server.http.body import BodyReader
from server.http.disconnect import until_disconnect
from server.http.errors import json_response
from server.http.lifespan import Lifecycle
from server.http.response_builder import ChatReply, Reply, TextReply
from server.http.sse import EventStream, stream
from server.observability.metrics import Metrics
from server.observability.request_context import TokenCost, note_tokens
from server.pipeline.best_of_n import BestOfN
from server.pipeline.types import BestOfNRequest, BestOfNResult, RunObserver, RunObservers
from server.schemas.requests import ChatCompletionRequest, CompletionRequest, GenerationRequest


class CompletionEndpoints:
    """Both request formats, chat and text, over the same best-of-N run."""

    def __init__(
        self, lifecycle: Lifecycle, settings: Settings, metrics: Metrics, body: BodyReader, admission: Admission
    ) -> None:
        self._lifecycle = lifecycle
        self._settings = settings
        self._metrics = metrics
        self._body = body
        self._admission = admission

    async def chat_completions(self, request: Request) -> Response:
        """Answers a conversation with the best of N candidates."""
        body = await self._body.read(request, ChatCompletionRequest)
        return await self._complete(request, body, ChatReply(body))

    async def completions(self, request: Request) -> Response:
        """Continues a text with the best of N candidates."""
        body = await self._body.read(request, CompletionRequest)
        return await self._complete(request, body, TextReply(body))

    async def _complete(self, request: Request, body: GenerationRequest, reply: Reply) -> Response:
        best_of_n_request = body.to_request(self._settings)
        pipeline = self._lifecycle.pipeline
        _check_served(pipeline, body.model, best_of_n_request.reward_model)
        run = partial(self._run, request.scope[ACCOUNT], pipeline, best_of_n_request)
        if body.stream:
            events = stream(run, reply, best_of_n_request)
            return EventStream(await until_disconnect(request.receive, anext(events)), events)
        return json_response(reply.completion(await until_disconnect(request.receive, run())))

    async def _run(
        self, account: Account, pipeline: BestOfN, request: BestOfNRequest, observer: RunObserver | None = None
    ) -> BestOfNResult:
        """Runs the request once it is admitted; its estimated tokens are reserved before, and the used ones settled."""
        observers = [self._metrics.run(), *([observer] if observer else [])]
        tokens = requested_tokens(request)
        with account.spending(tokens) as spending:
            async with self._admission.admitted(request.at_once, tokens, request.deadline_s) as queued_s:
                result = await pipeline.run(request, RunObservers(*observers), queued_s=queued_s)
            spending.tokens = result.prompt_tokens + result.generated_tokens
        note_tokens(TokenCost(result.prompt_tokens, result.generated_tokens, result.scored_tokens))
        return result


def _check_served(pipeline: BestOfN, model: str, reward_model: str | None) -> None:
    if model != pipeline.generator.model:
        raise NotFoundError(
            f"The model {model!r} is not served here; ask for {pipeline.generator.model}.", param="model"
        )
    try:
        pipeline.scorer(reward_model)
    except BadRequestError as error:
        raise BadRequestError(error.message, param="nbest.reward_model") from error
