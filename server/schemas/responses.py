"""The replies of the API: OpenAI's objects, with a reward on each choice and the account of the request in `nbest`.

Only fields that were set are sent: a field that OpenAI omits is not set, and one that OpenAI sends as null is set to
None. A missing reward, NaN inside of the server, is sent as null.
"""

from typing import Literal

from pydantic import BaseModel, Field

from reranker.candidate import FinishReason
from server.pipeline.strategies import RankedBy, Strategy
from server.pipeline.types import StoppedBy


class Usage(BaseModel):
    """Prompt tokens once, and the completion tokens of all completed candidates, winners or not.

    With speculative_rejection and straggler_cut also the tokens of cancelled candidates, up to their cancellation.
    """

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TimingsReply(BaseModel):
    """Seconds; generating and scoring overlap, so the parts do not add up to the total."""

    queue: float = Field(description="Waiting for admission and for the first candidate to start.")
    generate: float = Field(description="From the start of the first candidate to the end of the last.")
    score: float = Field(description="Time in which at least one scorer call was running.")
    select: float = Field(description="The selection alone.")
    total: float


class DrawnCandidate(BaseModel):
    """A candidate."""

    index: int = Field(description="Its position in the order of sampling; its seed is the request's seed + index.")
    text: str
    cumulative_logprob: float | None = Field(
        description="Sum of the log-probabilities of its tokens, in nats; null where an upstream server returns none."
    )
    finish_reason: FinishReason | None
    num_tokens: int


class CandidateReply(DrawnCandidate):
    """A candidate with its reward, chosen or not."""

    reward: float | None


class CandidateFinished(DrawnCandidate):
    """Event of a stream with `stream_candidates`: a candidate has finished and has not been scored yet."""

    event: Literal["finished"]


class CandidateScored(BaseModel):
    """Event of a stream with `stream_candidates`: a finished candidate has been scored."""

    event: Literal["scored"]
    index: int
    reward: float | None = Field(description="null where the scorer returned no number for it.")


class CandidateFailed(BaseModel):
    """Event of a stream with `stream_candidates`: a candidate has failed and will not finish."""

    event: Literal["failed"]
    index: int
    reason: str


CandidateEvent = CandidateFinished | CandidateScored | CandidateFailed


class NBestReply(BaseModel):
    """The account of a best-of-N request; completed + failed + cancelled + not_drawn = best_of."""

    best_of: int
    completed: int
    failed: int
    cancelled: int
    not_drawn: int = Field(description="Candidates that an adaptive policy decided not to sample.")
    ranking: list[int] = Field(
        description="Indexes of the completed candidates, best first: choices[i] is the candidate ranking[i]."
    )
    strategy: Strategy
    reward_model: str | None = Field(description="null where the strategy uses none; all rewards are null then.")
    ranked_by: RankedBy = Field(
        description="What ranked the candidates. answer: votes for answers (majority, weighted_majority). reward: all "
        "other strategies, and weighted_majority where no candidate has an answer. logprob, first: the fallback chosen "
        "by nbest.on_reward_failure; first also where majority found no answer, or where a deadline left no reward."
    )
    stopped_by: StoppedBy = Field(
        description="all: no candidate was cancelled. deadline: nbest.deadline_s. Otherwise the stopping policy."
    )
    generated_tokens: int
    scored_tokens: int
    prompt_tokens_cut: int = Field(
        description="Oldest tokens of the prompt that the reward model did not read, to fit the longest candidate."
    )
    candidate_s: float = Field(
        description="Cost of the request for the engine: the sum of the seconds that each candidate ran, whether it "
        "completed, failed or was cancelled. Divided by timings_s.generate, the mean number of concurrent candidates."
    )
    kl_upper_bound: float = Field(
        description="log N - (N-1)/N nats with N = best_of - failed: upper bound of the KL divergence of the chosen "
        "answer's distribution from the policy's. N includes candidates that a deadline or a policy cancelled or never "
        "sampled, since they could have been chosen. With blockwise, the bound of one block times the number of blocks."
    )
    blocks: int = Field(description="blockwise: number of blocks, chosen one after another. Otherwise 1.")
    timings_s: TimingsReply
    candidates: list[CandidateReply] = Field(
        default=[], description="All completed candidates, in the order of sampling; only with return_candidates."
    )


class TopLogprob(BaseModel):
    """One of the most likely tokens at a position."""

    token: str
    logprob: float
    bytes: list[int] | None = Field(description="UTF-8; null for a token that is part of a character.")


class ChatTokenLogprob(TopLogprob):
    """A generated token."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities in the format of chat completions."""

    content: list[ChatTokenLogprob]
    refusal: None


class TextLogprobs(BaseModel):
    """Log-probabilities in the format of text completions: four lists with one item for each token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] = Field(
        description="The most likely tokens and the generated token, each with its log-probability."
    )
    text_offset: list[int] = Field(description="The character of the choice's text at which each token begins.")


class AssistantMessage(BaseModel):
    """The message of a choice."""

    role: Literal["assistant"]
    content: str
    refusal: None


class Choice(BaseModel):
    """One answer; index 0 is the best."""

    index: int
    finish_reason: FinishReason | None
    reward: float | None = Field(description="Higher is better; comparable within one reward model only.")


class ChatChoice(Choice):
    """One answer of a chat completion."""

    message: AssistantMessage
    logprobs: ChatLogprobs | None


class TextChoice(Choice):
    """One answer of a text completion."""

    text: str
    logprobs: TextLogprobs | None


class Delta(BaseModel):
    """What a chunk adds to the message."""

    role: Literal["assistant"] = Field(default="assistant", description="In the first chunk of a choice only.")
    content: str = Field(default="", description="Absent from the last chunk of a choice.")


class ChunkChoice(BaseModel):
    """A part of a choice; the last part has `finish_reason` and `reward`."""

    index: int
    finish_reason: FinishReason | None
    reward: float | None = None


class ChatChunkChoice(ChunkChoice):
    """A part of a choice of a chat completion."""

    delta: Delta
    logprobs: ChatLogprobs | None


class TextChunkChoice(ChunkChoice):
    """A part of a choice of a text completion."""

    text: str
    logprobs: TextLogprobs | None


class Envelope(BaseModel):
    """The fields that all completion objects share."""

    id: str
    created: int
    model: str
    system_fingerprint: None


class ChatCompletion(Envelope):
    """The reply of POST /v1/chat/completions."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage
    nbest: NBestReply


class TextCompletion(Envelope):
    """The reply of POST /v1/completions."""

    object: Literal["text_completion"]
    choices: list[TextChoice]
    usage: Usage
    nbest: NBestReply


class Chunk(Envelope):
    """An event of a stream.

    The last chunk with a choice has the account of the request in `nbest`. With `stream_candidates` there are also
    chunks without choices, whose `nbest` is the event of a candidate.
    """

    usage: Usage | None = None
    nbest: NBestReply | CandidateEvent | None = None


class ChatCompletionChunk(Chunk):
    """An event of a chat stream."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]


class TextCompletionChunk(Chunk):
    """An event of a completion stream."""

    object: Literal["text_completion"]
    choices: list[TextChunkChoice]


class ScoreUsage(BaseModel):
    """The tokens that the reward model read."""

    prompt_tokens: int
    total_tokens: int
    prompt_tokens_cut: int = Field(
        description="Oldest tokens of the prompt that the reward model did not read, to fit the longest candidate."
    )


class Score(BaseModel):
    """The score of a candidate."""

    index: int
    score: float | None = Field(description="Higher is better; null where this candidate could not be scored.")


class ScoreReply(BaseModel):
    """The reply of POST /v1/score, with the scores in the order of the candidates."""

    model: str
    data: list[Score]
    usage: ScoreUsage


class Model(BaseModel):
    """The served policy, and the scorers served with it."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    reward_models: list[str] = Field(description="The values of nbest.reward_model; the first is the default.")


class ModelList(BaseModel):
    """The reply of GET /v1/models."""

    object: Literal["list"]
    data: list[Model]


class Status(BaseModel):
    """The reply of GET /health and GET /ready."""

    status: Literal["ok", "ready"]


class AdapterReply(BaseModel):
    """The reply of POST /admin/adapter: the adapter of all later requests."""

    path: str
    version: str


class ErrorBody(BaseModel):
    """What went wrong, and what to do about it."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """OpenAI's error envelope."""

    error: ErrorBody
