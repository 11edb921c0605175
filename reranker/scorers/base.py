"""The scorer protocol: one narrow method, so that a reward model, a judge and a scripted double look alike."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

from reranker.candidate import Candidate, Prompt


class ScoringError(Exception):
    """The scorer could not score these candidates. The message says why; nothing about the candidates is known."""


@dataclass(frozen=True, slots=True)
class Scores:
    """Rewards in the order of the candidates asked about, and the tokens the scorer read to find them.

    `rewards_N` holds one float per candidate: higher is better, NaN where this one could not be scored.
    `scored_tokens` counts prompt and candidate tokens as the scorer computed them (a shared prompt counts once), and
    what a judge writes. `prompt_tokens_cut` is how many of the prompt's, the oldest, the scorer left out so that the
    longest of these candidates fits its context.
    """

    rewards_N: tuple[float, ...]
    scored_tokens: int
    prompt_tokens_cut: int = 0


@dataclass(frozen=True, slots=True)
class Needs:
    """What a scorer must be given beyond a prompt and a text.

    `all_candidates`: its rewards compare the candidates of one call, so all of a request's come together, in one call
    after the last has finished. `likelihood`: their `cumulative_logprob`. `top_logprobs`: so many most likely tokens
    beside each generated one (`TokenLogprob.top`), whether or not the client asked for any.
    """

    all_candidates: bool = False
    likelihood: bool = False
    top_logprobs: int = 0

    @classmethod
    def to_compare(cls, members: Iterable["Scorer"]) -> Self:
        """Of a scorer that compares all candidates by the rewards of these."""
        needs = [member.needs for member in members]
        return cls(
            all_candidates=True,
            likelihood=any(one.likelihood for one in needs),
            top_logprobs=max(one.top_logprobs for one in needs),
        )


class Scorer(Protocol):
    """Says how good each candidate is as an answer to the prompt."""

    @property
    def name(self) -> str:
        """The name a request chooses it by (`nbest.reward_model`)."""

    @property
    def needs(self) -> Needs:
        """What whoever calls `score` must provide; most scorers need nothing (`Needs()`)."""

    async def score(self, prompt: Prompt, candidates: Sequence[Candidate]) -> Scores:
        """One reward per candidate, in order.

        Calls may overlap. Each holds any part of a request's candidates, or all of them if the scorer `needs` that.

        Raises:
            ScoringError: none of these candidates could be scored.
        """

    async def close(self) -> None:
        """Frees what the scorer holds."""
