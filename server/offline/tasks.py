"""A row of the input becomes a `Task`, or a `Failure` that says what is wrong with it.

A row is one of

    {"custom_id"?, "messages" | "prompt", "best_of"?, …}       the fields of a request to the server; to rerank,
                                                               {…, "candidates": [text or object], "reward_model"?}
    {"custom_id"?, "method"?, "url", "body": {…}}              a line of an OpenAI batch file
    a line of results.jsonl                                    to rerank: its candidates, with all that is known of them

Requests are checked by the very models that the server reads them with (`server.schemas.requests`). What a row leaves
open is taken from the run's options. Without a `seed` of its own, row number L gets

    seed of the run + (L − 1) · SEED_STRIDE

so that no two candidates of a run share a seed, and the server gives the same candidates when it is asked with the seed
that the result tells.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from reranker.candidate import Candidate, FinishReason
from server.config import Settings
from server.errors import BadRequestError
from server.generation.base import SamplingParams
from server.http.response_builder import candidate_reply
from server.offline.custom_ids import CustomIds
from server.offline.inputs import Row
from server.offline.records import Failure, Result, Turn
from server.pipeline.types import BestOfNRequest, BestOfNResult
from server.schemas.options import NBestOptions
from server.schemas.requests import ChatCompletionRequest, CompletionRequest, GenerationRequest, ScoreRequest
from server.schemas.strict import StrictModel, parse_object, validated

SEED_STRIDE = 1 << 16
"""More than any best_of."""
BATCH_FILE_FIELDS = {"custom_id", "method", "url", "body"}
REQUESTS: dict[str, type[GenerationRequest]] = {
    "/v1/chat/completions": ChatCompletionRequest,
    "/v1/completions": CompletionRequest,
}
UNTOLD = {"seed", "likelihood"}
"""What results do not tell of a sampling: it is told beside it, or has no say in what is drawn."""
OWN_OF_RESULTS = set(Result.model_fields) - {"candidates", "messages", "prompt", "model", "sampling", "seed"}
"""Fields of a line of results.jsonl that are about the selection that was, not about the candidates."""


@dataclass(frozen=True, slots=True)
class Task:
    """A row to be answered. `given` are its candidates, where they are not to be drawn."""

    line: int
    custom_id: str
    request: BestOfNRequest
    model: str | None
    sampling: Mapping[str, Any]
    given: tuple[Candidate, ...] = ()

    def result(self, found: BestOfNResult) -> Result:
        """The line of results.jsonl."""
        prompt = self.request.prompt
        asked: dict[str, Any] = (
            {"prompt": prompt.text}
            if prompt.text is not None
            else {"messages": [Turn(role=one.role, content=one.content) for one in prompt.messages]}
        )
        drawn = sorted(found.selection.ranking, key=lambda one: one.candidate.index)
        return Result(
            custom_id=self.custom_id,
            line=self.line,
            **asked,
            winner=candidate_reply(found.selection.winner),
            candidates=[candidate_reply(one) for one in drawn],
            best_of=found.best_of,
            failed=found.failed,
            model=self.model,
            reward_model=found.reward_model,
            strategy=found.strategy,
            ranked_by=found.ranked_by,
            stopped_by=found.stopped_by,
            sampling=dict(self.sampling),
            seed=self.request.sampling.seed,
            prompt_tokens=found.prompt_tokens,
            generated_tokens=found.generated_tokens,
            scored_tokens=found.scored_tokens,
        )


class Kind(Protocol):
    """What is to be done with the rows of a run."""

    def task(self, line: int, custom_id: str, document: dict[str, Any]) -> Task:
        """The task in the fields of a row, without its custom_id.

        Raises:
            BadRequestError: it cannot be honoured.
        """


def read_task(line: int, row: Row, kind: Kind, names: CustomIds, max_line_bytes: int) -> Task | Failure:
    """What a row asks for; `names` holds those of the rows before."""
    custom_id = None
    try:
        document = _document(row, max_line_bytes)
        custom_id = _custom_id(document)
        if not names.take(custom_id, line):
            raise BadRequestError(
                f"The custom_id {custom_id or line} was given before; give every line one of its own, or none.",
                param="custom_id",
            )
        return kind.task(line, custom_id or str(line), document)
    except BadRequestError as error:
        return Failure(custom_id=custom_id, line=line, reason=error.message, param=error.param)


@dataclass(frozen=True, slots=True)
class BatchTasks:
    """Rows whose candidates are to be drawn. `defaults` stand beneath the fields of each."""

    settings: Settings
    model: str
    seed: int
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def task(self, line: int, custom_id: str, document: dict[str, Any]) -> Task:
        body, kind = _request(document)
        given = {name: value for name, value in body.items() if value is not None}
        beneath = {"model": self.model, "seed": self.seed + (line - 1) * SEED_STRIDE, **self.defaults}
        if "max_completion_tokens" in given:
            beneath.pop("max_tokens", None)
        asked = validated(beneath | given, kind)
        if asked.model != self.model:
            raise BadRequestError(f"The model {asked.model!r} is not the one here, {self.model}.", param="model")
        if asked.stream:
            raise BadRequestError("Nothing is streamed offline; leave stream out.", param="stream")
        request = asked.to_request(self.settings)
        if request.strategy == "blockwise":
            raise BadRequestError(
                "A run keeps whole candidates, and blockwise leaves one; ask nbest serve, or choose another strategy.",
                param="nbest.strategy",
            )
        if request.sampling.logprobs is not None:
            raise BadRequestError("Results tell no token's log-probability; leave logprobs out.", param="logprobs")
        recorded = replace(request, sampling=replace(request.sampling, likelihood=True))
        return Task(line, custom_id, recorded, self.model, _told(request.sampling))


class GivenCandidate(StrictModel):
    """A candidate as results.jsonl tells it; its reward is about to be found anew."""

    text: str
    index: int | None = None
    reward: float | None = None
    cumulative_logprob: float | None = None
    finish_reason: FinishReason | None = None
    num_tokens: int = 0


class Origin(StrictModel):
    """Where given candidates come from, as far as it is known."""

    model: str | None = None
    sampling: dict[str, Any] | None = None
    seed: int | None = None
    nbest: NBestOptions | None = None


@dataclass(frozen=True, slots=True)
class RerankTasks:
    """Rows that bring their candidates."""

    settings: Settings

    def task(self, line: int, custom_id: str, document: dict[str, Any]) -> Task:
        if "body" in document:
            document = _body(document, ("/v1/score",))
        if "winner" in document:
            document = {name: value for name, value in document.items() if name not in OWN_OF_RESULTS}
        origin = validated({k: document.pop(k) for k in Origin.model_fields if k in document}, Origin)
        listed = document.get("candidates")
        told = [
            validated(one, GivenCandidate) if isinstance(one, dict) else None
            for one in (listed if isinstance(listed, list) else [])
        ]
        if told:
            texts = [known.text if known else text for known, text in zip(told, listed or [], strict=True)]
            document = document | {"candidates": texts}
        asked = validated(document, ScoreRequest)
        prompt, texts_alone = asked.to_prompt_and_candidates(self.settings)
        options = origin.nbest or NBestOptions()
        if options.stopping is not None and options.stopping.policy != "none":
            raise BadRequestError(
                "The candidates are there already, so none can be spared; leave stopping out.", param="nbest.stopping"
            )
        if options.strategy == "blockwise":
            raise BadRequestError(
                "The candidates are whole already, and blockwise chooses beginnings; choose another strategy.",
                param="nbest.strategy",
            )
        request = BestOfNRequest(
            prompt=prompt,
            sampling=SamplingParams(seed=origin.seed),
            best_of=len(texts_alone),
            reward_model=asked.reward_model or options.reward_model,
            strategy=options.strategy or "argmax",
            selection=options.to_selection(),
            deadline_s=options.deadline_s,
            on_reward_failure=options.on_reward_failure or "error",
        )
        given = tuple(_known(*one) for one in zip(texts_alone, told, strict=True))
        return Task(line, custom_id, request, origin.model, origin.sampling or {}, given)


def _document(row: Row, max_line_bytes: int) -> dict[str, Any]:
    if isinstance(row, dict):
        return {name: value for name, value in row.items() if value is not None}  # an empty cell says nothing
    if len(row.rstrip(b"\r\n")) > max_line_bytes:
        raise BadRequestError(f"The line is over {max_line_bytes} bytes; shorten it or raise --max-body-bytes.")
    return parse_object(row, "line")


def _custom_id(document: dict[str, Any]) -> str | None:
    custom_id = document.pop("custom_id", None)
    if custom_id is not None and not (isinstance(custom_id, str) and custom_id):
        raise BadRequestError("custom_id: give a string that is not empty, or leave it out.", param="custom_id")
    return custom_id


def _request(document: dict[str, Any]) -> tuple[dict[str, Any], type[GenerationRequest]]:
    """The body of a request in a row, and the endpoint it is for."""
    if "body" in document:
        return _body(document, tuple(REQUESTS)), REQUESTS[document["url"]]
    if ("messages" in document) == ("prompt" in document):
        raise BadRequestError("Give either messages or prompt, and exactly one of them.", param="messages")
    if "candidates" in document:
        raise BadRequestError("candidates are not drawn but given here; use nbest rerank.", param="candidates")
    return document, ChatCompletionRequest if "messages" in document else CompletionRequest


def _body(document: dict[str, Any], urls: tuple[str, ...]) -> dict[str, Any]:
    """The body of a line of an OpenAI batch file."""
    for name in document.keys() - BATCH_FILE_FIELDS:
        raise BadRequestError(f"{name} is not a field of a batch file's line; put it into body.", param=name)
    if document.get("method", "POST") != "POST":
        raise BadRequestError("method: only POST is answered here; write POST or leave it out.", param="method")
    if document.get("url") not in urls:
        raise BadRequestError(f"url: give {' or '.join(urls)}.", param="url")
    if not isinstance(document["body"], dict):
        raise BadRequestError("body: give an object with the fields of the request.", param="body")
    return dict(document["body"])


def _known(candidate: Candidate, told: GivenCandidate | None) -> Candidate:
    """The candidate with what its row tells of it."""
    if told is None:
        return candidate
    return replace(
        candidate,
        num_tokens=told.num_tokens,
        cumulative_logprob=told.cumulative_logprob,
        finish_reason=told.finish_reason or candidate.finish_reason,
    )


def _told(sampling: SamplingParams) -> dict[str, Any]:
    """The sampling as a result tells it: what was asked for, and nothing that was left open."""
    values = asdict(sampling) | {"logit_bias": {str(token): bias for token, bias in sampling.logit_bias}}
    return {name: value for name, value in values.items() if name not in UNTOLD and value not in (None, (), {})}
