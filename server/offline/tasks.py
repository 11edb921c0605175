"""Parses a row of the input into a `Task`, or into a `Failure` that says what is wrong with the row.

A row is one of

    {"custom_id"?, "messages" | "prompt", "best_of"?, …}       the fields of a request to the server; for rerank
                                                               {…, "candidates": [text or object], "reward_model"?}
    {"custom_id"?, "method"?, "url", "body": {…}}              a line of an OpenAI batch file
    a line of results.jsonl                                    for rerank: its candidates with all recorded fields

Requests are validated by the same models as in the server (`server.schemas.requests`). Fields that a row leaves out
come from the run's options. Row number L without a `seed` gets

    seed of the run + (L − 1) · SEED_STRIDE

so that no two candidates of a run share a seed. The result contains that seed, and the server returns the same
candidates for it.
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
"""Distance between the seeds of two rows; larger than any best_of."""
BATCH_FILE_FIELDS = {"custom_id", "method", "url", "body"}
REQUESTS: dict[str, type[GenerationRequest]] = {
    "/v1/chat/completions": ChatCompletionRequest,
    "/v1/completions": CompletionRequest,
}
NOT_RECORDED = {"seed", "likelihood"}
"""Sampling fields that are not part of a result's `sampling`: the seed has a field of its own, and `likelihood` has no
effect on what is drawn."""
SELECTION_FIELDS = set(Result.model_fields) - {"candidates", "messages", "prompt", "model", "sampling", "seed"}
"""Fields of a line of results.jsonl that describe its selection and not its candidates; rerank drops them."""


@dataclass(frozen=True, slots=True)
class Task:
    """A row to be answered. `candidates` are those that the row brings, for rerank; otherwise they are drawn."""

    line: int
    custom_id: str
    request: BestOfNRequest
    model: str | None
    sampling: Mapping[str, Any]
    candidates: tuple[Candidate, ...] = ()

    def result(self, outcome: BestOfNResult) -> Result:
        """The line of results.jsonl."""
        prompt = self.request.prompt
        prompt_fields: dict[str, Any] = (
            {"prompt": prompt.text}
            if prompt.text is not None
            else {"messages": [Turn(role=message.role, content=message.content) for message in prompt.messages]}
        )
        drawn = sorted(outcome.selection.ranking, key=lambda scored: scored.candidate.index)
        return Result(
            custom_id=self.custom_id,
            line=self.line,
            **prompt_fields,
            winner=candidate_reply(outcome.selection.winner),
            candidates=[candidate_reply(scored) for scored in drawn],
            best_of=outcome.best_of,
            failed=outcome.failed,
            model=self.model,
            reward_model=outcome.reward_model,
            strategy=outcome.strategy,
            ranked_by=outcome.ranked_by,
            stopped_by=outcome.stopped_by,
            sampling=dict(self.sampling),
            seed=self.request.sampling.seed,
            prompt_tokens=outcome.prompt_tokens,
            generated_tokens=outcome.generated_tokens,
            scored_tokens=outcome.scored_tokens,
        )


class TaskParser(Protocol):
    """Makes tasks of the rows of one kind of run."""

    def parse(self, line: int, custom_id: str, fields: dict[str, Any]) -> Task:
        """The task of a row with these fields, custom_id excluded.

        Raises:
            BadRequestError: a field is invalid or is not supported here.
        """


def read_task(line: int, row: Row, parser: TaskParser, custom_ids: CustomIds, max_line_bytes: int) -> Task | Failure:
    """The task of a row, or why it has none; `custom_ids` are the names of the rows before."""
    custom_id = None
    try:
        fields = _fields(row, max_line_bytes)
        custom_id = _pop_custom_id(fields)
        if not custom_ids.claim(custom_id, line):
            raise BadRequestError(
                f"The custom_id {custom_id or line} is that of an earlier line; give every line its own, or none.",
                param="custom_id",
            )
        return parser.parse(line, custom_id or str(line), fields)
    except BadRequestError as error:
        return Failure(custom_id=custom_id, line=line, reason=error.message, param=error.param)


@dataclass(frozen=True, slots=True)
class BatchTaskParser:
    """For rows whose candidates are drawn. `defaults` are request fields for the rows that leave them out."""

    settings: Settings
    model: str
    seed: int
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def parse(self, line: int, custom_id: str, fields: dict[str, Any]) -> Task:
        body, request_type = _request_body(fields)
        present = {name: value for name, value in body.items() if value is not None}
        defaults = {"model": self.model, "seed": self.seed + (line - 1) * SEED_STRIDE, **self.defaults}
        if "max_completion_tokens" in present:
            defaults.pop("max_tokens", None)
        api_request = validated(defaults | present, request_type)
        if api_request.model != self.model:
            raise BadRequestError(
                f"The model {api_request.model!r} is not the model of this run, {self.model}.", param="model"
            )
        if api_request.stream:
            raise BadRequestError("Offline runs do not stream; leave stream out.", param="stream")
        request = api_request.to_request(self.settings)
        if request.strategy == "blockwise":
            raise BadRequestError(
                "Offline runs keep whole candidates, and blockwise keeps only one; choose another strategy, or use "
                "nbest serve.",
                param="nbest.strategy",
            )
        if request.sampling.logprobs is not None:
            raise BadRequestError("Results hold no log-probabilities of tokens; leave logprobs out.", param="logprobs")
        with_likelihood = replace(request, sampling=replace(request.sampling, likelihood=True))
        return Task(line, custom_id, with_likelihood, self.model, _recorded_sampling(request.sampling))


class InputCandidate(StrictModel):
    """A candidate as in results.jsonl; `reward` is ignored, because rerank scores it again."""

    text: str
    index: int | None = None
    reward: float | None = None
    cumulative_logprob: float | None = None
    finish_reason: FinishReason | None = None
    num_tokens: int = 0


class Origin(StrictModel):
    """What drew the candidates of a row, as far as the row says so, and how to select among them."""

    model: str | None = None
    sampling: dict[str, Any] | None = None
    seed: int | None = None
    nbest: NBestOptions | None = None


@dataclass(frozen=True, slots=True)
class RerankTaskParser:
    """For rows that bring their candidates."""

    settings: Settings

    def parse(self, line: int, custom_id: str, fields: dict[str, Any]) -> Task:
        if "body" in fields:
            fields = _body(fields, ("/v1/score",))
        if "winner" in fields:
            fields = {name: value for name, value in fields.items() if name not in SELECTION_FIELDS}
        origin = validated({name: fields.pop(name) for name in Origin.model_fields if name in fields}, Origin)
        listed = fields.get("candidates")
        details = [
            validated(item, InputCandidate) if isinstance(item, dict) else None
            for item in (listed if isinstance(listed, list) else [])
        ]
        if details:
            texts = [detail.text if detail else text for detail, text in zip(details, listed or [], strict=True)]
            fields = fields | {"candidates": texts}
        score_request = validated(fields, ScoreRequest)
        prompt, candidates = score_request.to_prompt_and_candidates(self.settings)
        options = origin.nbest or NBestOptions()
        if options.stopping is not None and options.stopping.policy != "none":
            raise BadRequestError(
                "All candidates exist already, so a stopping policy saves nothing; leave stopping out.",
                param="nbest.stopping",
            )
        if options.strategy == "blockwise":
            raise BadRequestError(
                "The candidates are complete, and blockwise selects beginnings; choose another strategy.",
                param="nbest.strategy",
            )
        request = BestOfNRequest(
            prompt=prompt,
            sampling=SamplingParams(seed=origin.seed),
            best_of=len(candidates),
            reward_model=score_request.reward_model or options.reward_model,
            strategy=options.strategy or "argmax",
            selection=options.to_selection(),
            deadline_s=options.deadline_s,
            on_reward_failure=options.on_reward_failure or "error",
        )
        detailed = tuple(
            candidate if detail is None else _with_details(candidate, detail)
            for candidate, detail in zip(candidates, details, strict=True)
        )
        return Task(line, custom_id, request, origin.model, origin.sampling or {}, detailed)


def _fields(row: Row, max_line_bytes: int) -> dict[str, Any]:
    if isinstance(row, dict):
        return {name: value for name, value in row.items() if value is not None}  # an empty cell is a missing field
    if len(row.rstrip(b"\r\n")) > max_line_bytes:
        raise BadRequestError(f"The line is over {max_line_bytes} bytes; shorten it or raise --max-body-bytes.")
    return parse_object(row, "line")


def _pop_custom_id(fields: dict[str, Any]) -> str | None:
    custom_id = fields.pop("custom_id", None)
    if custom_id is not None and not (isinstance(custom_id, str) and custom_id):
        raise BadRequestError("custom_id: give a string that is not empty, or leave it out.", param="custom_id")
    return custom_id


def _request_body(fields: dict[str, Any]) -> tuple[dict[str, Any], type[GenerationRequest]]:
    """The request in a row, and the model that validates it."""
    if "body" in fields:
        return _body(fields, tuple(REQUESTS)), REQUESTS[fields["url"]]
    if ("messages" in fields) == ("prompt" in fields):
        raise BadRequestError("Give exactly one of messages and prompt.", param="messages")
    if "candidates" in fields:
        raise BadRequestError("nbest batch draws its own candidates; use nbest rerank for these.", param="candidates")
    return fields, ChatCompletionRequest if "messages" in fields else CompletionRequest


def _body(fields: dict[str, Any], urls: tuple[str, ...]) -> dict[str, Any]:
    """The request in a line of an OpenAI batch file."""
    for name in fields.keys() - BATCH_FILE_FIELDS:
        raise BadRequestError(f"{name} is not a field of a batch file's line; put it into body.", param=name)
    if fields.get("method", "POST") != "POST":
        raise BadRequestError("method: only POST is supported; write POST or leave it out.", param="method")
    if fields.get("url") not in urls:
        raise BadRequestError(f"url: give {' or '.join(urls)}.", param="url")
    if not isinstance(fields["body"], dict):
        raise BadRequestError("body: give an object with the fields of the request.", param="body")
    return dict(fields["body"])


def _with_details(candidate: Candidate, detail: InputCandidate) -> Candidate:
    return replace(
        candidate,
        num_tokens=detail.num_tokens,
        cumulative_logprob=detail.cumulative_logprob,
        finish_reason=detail.finish_reason or candidate.finish_reason,
    )


def _recorded_sampling(sampling: SamplingParams) -> dict[str, Any]:
    """The `sampling` of a result: the fields that have a value."""
    values = asdict(sampling) | {"logit_bias": {str(token): bias for token, bias in sampling.logit_bias}}
    return {name: value for name, value in values.items() if name not in NOT_RECORDED and value not in (None, (), {})}
