"""What clients get: OpenAI's objects with a reward on each choice and the account of the request in `nbest`.

Only what is set is sent, so a field that OpenAI leaves out is left out, and one that OpenAI sends as null is set to
None. A reward that is missing (NaN inside) is null.
"""

from typing import Literal

from pydantic import BaseModel, Field

from reranker.candidate import FinishReason
from server.pipeline.strategies import RankedBy, Strategy
from server.pipeline.types import StoppedBy


class Usage(BaseModel):
    """Prompt tokens once, completion tokens of all candidates that completed, winners or not.

    With speculative_rejection and straggler_cut also of those given up, until then.
    """

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TimingsReply(BaseModel):
    """Seconds; generating and scoring overlap, so the parts do not add up to the total."""

    queue: float
    generate: float
    score: float
    select: float
    total: float


class DrawnCandidate(BaseModel):
    """What was drawn."""

    index: int = Field(description="Its place in the order of drawing; its seed is the request's seed + index.")
    text: str
    cumulative_logprob: float | None = Field(description="Nats, over its tokens; null where an upstream tells none.")
    finish_reason: FinishReason | None
    num_tokens: int


class CandidateReply(DrawnCandidate):
    """A candidate, chosen or not."""

    reward: float | None


class CandidateFinished(DrawnCandidate):
    """Event of a stream with `stream_candidates`: a candidate has finished, and has not been scored yet."""

    event: Literal["finished"]


class CandidateScored(BaseModel):
    """Event of a stream with `stream_candidates`: a candidate that has finished was scored."""

    event: Literal["scored"]
    index: int
    reward: float | None = Field(description="null where the scorer has no number for it.")


class CandidateFailed(BaseModel):
    """Event of a stream with `stream_candidates`: a candidate will never finish."""

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
    not_drawn: int = Field(description="Candidates that an adaptive policy found not worth drawing.")
    ranking: list[int] = Field(
        description="Candidates that completed, best first: choices[i] is the one whose index stands at i."
    )
    strategy: Strategy
    reward_model: str | None = Field(description="null where the strategy asks none; the rewards are null then too.")
    ranked_by: RankedBy = Field(
        description="What ordered the candidates. answer: votes for answers (majority, weighted_majority). reward: all "
        "other strategies, and weighted_majority where no candidate has an answer. logprob, first: the fallback that "
        "nbest.on_reward_failure asked for; first also where majority found no answer, or a deadline left no reward."
    )
    stopped_by: StoppedBy = Field(
        description="all: nothing was cut short. deadline: nbest.deadline_s. Else the stopping policy."
    )
    generated_tokens: int
    scored_tokens: int
    prompt_tokens_cut: int = Field(
        description="Tokens of the prompt, the oldest, that the reward model left out to fit the longest candidate."
    )
    candidate_s: float = Field(
        description="What the request cost the engine: seconds that each candidate was under way, added up, whether it "
        "completed, failed or was cancelled. Divided by timings_s.generate: how many ran side by side."
    )
    kl_upper_bound: float = Field(
        description="log N - (N-1)/N nats with N = best_of - failed: the furthest the choice moves from the policy. "
        "Candidates that a deadline or a policy cut off or never drew count, since they could have been chosen. "
        "Under blockwise that is the bound of a block, and counts once for each."
    )
    blocks: int = Field(description="blockwise: how many were chosen, one after another. Else 1.")
    timings_s: TimingsReply
    candidates: list[CandidateReply] = Field(
        default=[], description="All that completed, in the order of drawing; only where return_candidates asks."
    )


class TopLogprob(BaseModel):
    """One of the likeliest tokens at a place."""

    token: str
    logprob: float
    bytes: list[int] | None = Field(description="UTF-8; null for a token that is part of a character.")


class ChatTokenLogprob(TopLogprob):
    """A generated token."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities in the shape of chat completions."""

    content: list[ChatTokenLogprob]
    refusal: None


class TextLogprobs(BaseModel):
    """Log-probabilities in the shape of completions; the four lists run side by side."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] = Field(description="The likeliest tokens and the generated one.")
    text_offset: list[int] = Field(description="Where each token begins in the choice's text, in characters.")


class AssistantMessage(BaseModel):
    """The text of a choice."""

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
    """One answer of a completion."""

    text: str
    logprobs: TextLogprobs | None


class Delta(BaseModel):
    """What a chunk adds to the message."""

    role: Literal["assistant"] = Field(default="assistant", description="In the first piece of a choice.")
    content: str = Field(default="", description="Absent from the last piece.")


class ChunkChoice(BaseModel):
    """A piece of a choice; the last one brings `finish_reason` and `reward`."""

    index: int
    finish_reason: FinishReason | None
    reward: float | None = None


class ChatChunkChoice(ChunkChoice):
    """A piece of a chat choice."""

    delta: Delta
    logprobs: ChatLogprobs | None


class TextChunkChoice(ChunkChoice):
    """A piece of a completion's choice."""

    text: str
    logprobs: TextLogprobs | None


class Envelope(BaseModel):
    """What every completion object begins with."""

    id: str
    created: int
    model: str
    system_fingerprint: None


class ChatCompletion(Envelope):
    """The answer to a chat completion request."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage
    nbest: NBestReply


class TextCompletion(Envelope):
    """The answer to a completion request."""

    object: Literal["text_completion"]
    choices: list[TextChoice]
    usage: Usage
    nbest: NBestReply


class Chunk(Envelope):
    """An event of a stream.

    The last one that has a choice brings the account in `nbest`. With `stream_candidates` there are others before it,
    without choices, that each bring an event there.
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
    """Tokens that the reward model read."""

    prompt_tokens: int
    total_tokens: int
    prompt_tokens_cut: int = Field(
        description="Tokens of the prompt, the oldest, that the reward model left out to fit the longest candidate."
    )


class Score(BaseModel):
    """The score of one candidate."""

    index: int
    score: float | None = Field(description="Higher is better; null where this candidate could not be scored.")


class ScoreReply(BaseModel):
    """The answer to a score request, in the order of its candidates."""

    model: str
    data: list[Score]
    usage: ScoreUsage


class Model(BaseModel):
    """A policy that can be asked, and the scorers served beside it."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    reward_models: list[str] = Field(description="What nbest.reward_model may name; the first is the default.")


class ModelList(BaseModel):
    """The answer to GET /v1/models."""

    object: Literal["list"]
    data: list[Model]


class Status(BaseModel):
    """The answer of the two probes."""

    status: Literal["ok", "ready"]


class AdapterReply(BaseModel):
    """The adapter that requests are answered with from now on."""

    path: str
    version: str


class ErrorBody(BaseModel):
    """What went wrong, and the way out."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """OpenAI's error envelope."""

    error: ErrorBody
