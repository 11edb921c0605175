"""The scorer protocol, which reward models, judges, functions and the test doubles implement."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, Self

from reranker.candidate import Candidate, Prompt


class ScoringError(Exception):
    """The scorer could not score any of these candidates. The message gives the reason."""


class UnscorableError(ScoringError):
    """The scorer cannot read what it was given, so another try cannot succeed; `part` is what has to change."""

    part: Literal["prompt", "candidates"] = "prompt"


class UnscorableCandidatesError(UnscorableError):
    """The scorer can read the prompt, but none of the candidates: they are too long."""

    part = "candidates"


@dataclass(frozen=True, slots=True)
class Scores:
    """Rewards in the order of the candidates, and the number of tokens that the scorer processed.

    `rewards_N` holds one float per candidate: higher is better, NaN if the candidate could not be scored.
    `scored_tokens` counts the prompt and candidate tokens that the scorer computed (a shared prompt counts once), and
    the tokens that a judge generates. `prompt_tokens_cut` is how many of the oldest prompt tokens the scorer left out
    so that the longest of these candidates fits its context.
    """

    rewards_N: tuple[float, ...]
    scored_tokens: int
    prompt_tokens_cut: int = 0


@dataclass(frozen=True, slots=True)
class Needs:
    """What a scorer needs from its caller besides the prompt and the texts of the candidates.

    `all_candidates`: all candidates of a request in one call, after the last has finished, because the rewards compare
    them with each other. `likelihood`: `Candidate.cumulative_logprob`. `top_logprobs`: this many of the most likely
    tokens for each generated token (`TokenLogprob.top`), whether or not the client requested any.
    """

    all_candidates: bool = False
    likelihood: bool = False
    top_logprobs: int = 0

    @classmethod
    def to_compare(cls, members: Iterable["Scorer"]) -> Self:
        """The needs of a scorer that combines the rewards of all members over all candidates."""
        needs = [member.needs for member in members]
        return cls(
            all_candidates=True,
            likelihood=any(member_needs.likelihood for member_needs in needs),
            top_logprobs=max(member_needs.top_logprobs for member_needs in needs),
        )


class Scorer(Protocol):
    """Rewards each candidate for how well it answers the prompt."""

    @property
    def name(self) -> str:
        """The name by which a request selects the scorer (`nbest.reward_model`)."""

    @property
    def needs(self) -> Needs:
        """What the caller of `score` must provide; most scorers need nothing (`Needs()`)."""

    async def check(self, prompt: Prompt) -> None:
        """Returns if candidates of this prompt can be scored; cheap, so it can precede the sampling.

        Raises:
            UnscorableError: none can.
        """

    async def score(self, prompt: Prompt, candidates: Sequence[Candidate]) -> Scores:
        """Returns one reward per candidate, in order.

        Calls may overlap. A call holds any subset of a request's candidates, or all of them if `needs.all_candidates`.

        Raises:
            ScoringError: none of these candidates could be scored.
            UnscorableError: nor can they be by another try.
        """

    async def close(self) -> None:
        """Frees the scorer's resources."""


class ReadsAnyPrompt:
    """The `check` of a scorer that can read every prompt."""

    async def check(self, prompt: Prompt) -> None:
        """Returns."""
