"""Scores the candidates of one request in groups as they finish; several groups may be scored at the same time.

A scorer may need more than the text (`Needs`). A scorer that compares candidates with each other gets all of them in
one call, after the last has finished. For a scorer that reads log-probabilities the engine computes them
(`sampling_for`), and those that the client did not request are removed before the observer is called (`as_requested`).
"""

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import overload

from reranker.candidate import Candidate, FailedCandidate, Prompt, ScoredCandidate
from reranker.scorers.base import Scorer, ScoringError, UnscorableError
from reranker.scorers.busy_time import OverlapTimer
from server.errors import BadRequestError
from server.generation.base import Outcome, SamplingParams


class Scoring:
    """Collects the rewards of one prompt's candidates while others are still generated; without a scorer, none.

    `on_reward` is called with each candidate that has been scored. `failure` is the last error of the scorer, if any:
    the candidates of that group have no reward.
    """

    def __init__(
        self, scorer: Scorer | None, prompt: Prompt, on_reward: Callable[[ScoredCandidate], None] | None = None
    ) -> None:
        self._scorer = scorer
        self._prompt = prompt
        self._on_reward = on_reward
        self._held: list[Candidate] = []
        self._calls: set[asyncio.Task[None]] = set()
        self._rewards: dict[int, float] = {}
        self._timer = OverlapTimer()
        self.scored_tokens = 0
        self.prompt_tokens_cut = 0
        self.failure: ScoringError | None = None

    @property
    def busy_s(self) -> float:
        """Seconds in which at least one scorer call was running."""
        return self._timer.seconds

    @property
    def reward_model(self) -> str | None:
        """The name of the scorer, if there is one."""
        return self._scorer.name if self._scorer else None

    def start(self, candidates: Sequence[Candidate]) -> None:
        """Sends these candidates to the scorer, or keeps them for one that needs all; returns at once."""
        if self._scorer is None:
            return
        if self._scorer.needs.all_candidates:
            self._held += candidates
        else:
            self._send(self._scorer, candidates, self._rewards)

    async def settled(self) -> Mapping[int, float]:
        """Waits for the running calls; returns the rewards so far, by the candidate's index."""
        await asyncio.gather(*self._calls)
        return self._rewards

    async def beginnings(self, candidates: Sequence[Candidate]) -> dict[int, float]:
        """The rewards of these growing candidates if they ended here, by index; NaN where the scorer gives none."""
        rewards = {candidate.index: math.nan for candidate in candidates}
        if self._scorer is not None:
            self._send(self._scorer, [replace(candidate, is_beginning=True) for candidate in candidates], rewards)
        await self.settled()
        return rewards

    async def finish(self) -> None:
        """Waits for the calls of all candidates. An error that is not a `ScoringError` is a bug and is raised.

        `start` must have been called with every candidate: a scorer that needs all of them gets them now.
        """
        if self._scorer is not None:
            self._send(self._scorer, sorted(self._held, key=lambda candidate: candidate.index), self._rewards)
        await asyncio.gather(*self._calls)

    def _send(self, scorer: Scorer, candidates: Sequence[Candidate], rewards: dict[int, float]) -> None:
        """Starts a call that writes the rewards of these candidates into `rewards`."""
        if not candidates:
            return
        call = asyncio.create_task(self._score(scorer, candidates, rewards))
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)

    async def cancel(self) -> None:
        """Cancels the calls that still run."""
        calls = list(self._calls)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)

    def rewarded(self, candidates: Sequence[Candidate]) -> list[ScoredCandidate]:
        """These candidates with their rewards so far, NaN where there is none."""
        return [ScoredCandidate(candidate, self._rewards.get(candidate.index, math.nan)) for candidate in candidates]

    async def _score(self, scorer: Scorer, candidates: Sequence[Candidate], rewards: dict[int, float]) -> None:
        try:
            with self._timer:
                scores = await scorer.score(self._prompt, candidates)
        except ScoringError as error:
            self.failure = error
            return
        self.scored_tokens += scores.scored_tokens
        self.prompt_tokens_cut = max(self.prompt_tokens_cut, scores.prompt_tokens_cut)
        rewards.update(zip((candidate.index for candidate in candidates), scores.rewards_N, strict=True))
        if self._on_reward is not None and rewards is self._rewards:  # not for growing candidates
            for scored in self.rewarded(candidates):
                self._on_reward(scored)


def as_bad_request(error: UnscorableError, prompt: Prompt, candidates_param: str) -> BadRequestError:
    """The client's error for what the scorer cannot read; the candidates' lengths depend on the field of that name."""
    prompt_param = "messages" if prompt.text is None else "prompt"
    param = prompt_param if error.part == "prompt" else candidates_param
    return BadRequestError(
        f"The reward model cannot score this: {error}. Change {param}, or name another reward_model.", param=param
    )


def sampling_for(scorer: Scorer | None, requested: SamplingParams, *, ranks_by_logprob: bool) -> SamplingParams:
    """The sampling to generate with: what was requested, and what the scorer or its fallback needs besides."""
    if scorer is None:
        return requested
    top = scorer.needs.top_logprobs
    return replace(
        requested,
        likelihood=requested.likelihood or scorer.needs.likelihood or ranks_by_logprob,
        logprobs=top if top > (requested.logprobs or 0) else requested.logprobs,
    )


@overload
def as_requested(outcome: Candidate, requested: SamplingParams) -> Candidate: ...
@overload
def as_requested(outcome: Outcome, requested: SamplingParams) -> Outcome: ...
def as_requested(outcome: Outcome, requested: SamplingParams) -> Outcome:
    """The outcome with the log-probabilities that were requested, and no more."""
    if isinstance(outcome, FailedCandidate) or outcome.logprobs is None:
        return outcome
    if requested.logprobs is None:
        return replace(outcome, logprobs=None)
    top_K = requested.logprobs
    return replace(outcome, logprobs=tuple(replace(token, top=token.top[:top_K]) for token in outcome.logprobs))
