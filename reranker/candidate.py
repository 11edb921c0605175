"""What travels from the prompt to the winner.

Every stage adds a layer and changes nothing beneath it:

    Prompt -> Candidate (generation) -> ScoredCandidate (scoring) -> Selection (selection)
"""

import math
from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "content_filter"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is to be answered: a conversation, or a text to be continued; exactly one of the two."""

    messages: tuple[Message, ...] = ()
    text: str | None = None

    def __post_init__(self) -> None:
        if bool(self.messages) == (self.text is not None):
            raise ValueError("a prompt is either messages or text, and exactly one of them")


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One generated token, its log-probability in nats, and the most likely tokens at its place, best first."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Candidate:
    """One sample of the policy.

    `index` is its place among the N of its request; its seed is the request's seed + index. `finish_reason` is None
    while it is still being generated: such a snapshot holds all text and tokens so far. `token_ids` is empty and
    `cumulative_logprob` (nats, over the generated tokens) None where an upstream server does not tell them.
    `is_beginning`: others may go on from it, so a scorer does well to keep what it computed.
    `weights_version` names the adapter or the reloaded weights that drew it; None for the model as it was started.
    """

    index: int
    text: str
    num_tokens: int
    token_ids: tuple[int, ...] = ()
    cumulative_logprob: float | None = None
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    weights_version: str | None = None
    is_beginning: bool = False

    @property
    def mean_logprob(self) -> float:
        """Mean log-probability a token in nats; NaN where unknown or without tokens."""
        if self.cumulative_logprob is None or self.num_tokens == 0:
            return math.nan
        return self.cumulative_logprob / self.num_tokens


@dataclass(frozen=True, slots=True)
class FailedCandidate:
    """A candidate that will never finish, and why."""

    index: int
    reason: str


@dataclass(frozen=True, slots=True)
class ScoredCandidate:
    """A candidate and its reward: higher is better, unbounded, not comparable between scorers, NaN where missing."""

    candidate: Candidate
    reward: float

    @property
    def has_reward(self) -> bool:
        return not math.isnan(self.reward)


@dataclass(frozen=True, slots=True)
class Selection:
    """All candidates of one prompt, best first."""

    ranking: tuple[ScoredCandidate, ...]

    @property
    def winner(self) -> ScoredCandidate:
        return self.ranking[0]
