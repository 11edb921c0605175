"""The data types of a request, from the prompt to the winner.

Each stage wraps the objects of the stage before and does not change them:

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
    """The input of a request: either a conversation to reply to or a text to continue."""

    messages: tuple[Message, ...] = ()
    text: str | None = None

    def __post_init__(self) -> None:
        if bool(self.messages) == (self.text is not None):
            raise ValueError("a prompt needs exactly one of messages and text")


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One generated token, its log-probability in nats, and the most likely tokens at its position, best first."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Candidate:
    """One sample of the policy.

    `index` is its position among the N candidates of its request; its seed is the request's seed + index.
    `finish_reason` is None while the candidate is still being generated: such a snapshot holds all text and tokens so
    far. If an upstream server does not return them, `token_ids` is empty and `cumulative_logprob` (nats, over the
    generated tokens) is None. `is_beginning` marks a candidate that later candidates may continue, so that caching its
    keys and values saves a scorer work. `weights_version` names the adapter or the reloaded weights that generated it;
    None stands for the weights that the server started with.
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
        """Mean log-probability per token in nats; NaN if it is unknown or there are no tokens."""
        if self.cumulative_logprob is None or self.num_tokens == 0:
            return math.nan
        return self.cumulative_logprob / self.num_tokens


@dataclass(frozen=True, slots=True)
class FailedCandidate:
    """A candidate that will never finish, with the reason."""

    index: int
    reason: str


@dataclass(frozen=True, slots=True)
class ScoredCandidate:
    """A candidate and its reward: higher is better, unbounded, not comparable between scorers, NaN if missing."""

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
