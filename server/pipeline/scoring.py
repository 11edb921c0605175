"""The scoring of one request: groups of candidates go to the scorer as they finish, several groups at a time.

A scorer may need more (`Needs`). One that compares candidates with each other gets all of them in one call, when the
last has finished. One that reads log-probabilities gets them asked for (`sampling_for`), and what the client did
not ask for itself is taken off again before anyone else sees it (`as_asked`).
"""

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import overload

from reranker.candidate import Candidate, FailedCandidate, Prompt, ScoredCandidate
from reranker.scorers.base import Scorer, ScoringError
from reranker.scorers.busy_time import OverlapTimer
from server.generation.base import Outcome, SamplingParams


class Scoring:
    """Collects the rewards of one prompt's candidates while others are still being generated; without a scorer, none.

    `on_reward` hears of each candidate that has been scored. `failure` is the last error of the scorer, if any: the
    candidates of that group have no reward.
    `busy_s` is the time in which at least one scorer call was out.
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
        self._busy = OverlapTimer()
        self.scored_tokens = 0
        self.prompt_tokens_cut = 0
        self.failure: ScoringError | None = None

    @property
    def busy_s(self) -> float:
        return self._busy.seconds

    def start(self, candidates: Sequence[Candidate]) -> None:
        """Sends these candidates to the scorer, or holds them back for one that needs all; returns at once."""
        if self._scorer is None:
            return
        if self._scorer.needs.all_candidates:
            self._held += candidates
        else:
            self._send(self._scorer, candidates, self._rewards)

    async def settled(self) -> Mapping[int, float]:
        """Waits for the calls that are out; the rewards so far, by the candidate's index."""
        await asyncio.gather(*self._calls)
        return self._rewards

    async def beginnings(self, candidates: Sequence[Candidate]) -> dict[int, float]:
        """What these candidates would be worth if they ended here, by index; NaN where it cannot be told."""
        rewards = {one.index: math.nan for one in candidates}
        if self._scorer is not None:
            self._send(self._scorer, [replace(one, is_beginning=True) for one in candidates], rewards)
        await self.settled()
        return rewards

    async def finish(self) -> None:
        """All have been started: waits for all calls; an error that is not a `ScoringError` is a bug and is raised."""
        if self._scorer is not None:
            self._send(self._scorer, sorted(self._held, key=lambda one: one.index), self._rewards)
        await asyncio.gather(*self._calls)

    def _send(self, scorer: Scorer, candidates: Sequence[Candidate], rewards: dict[int, float]) -> None:
        """Asks for the rewards of these candidates, which go into `rewards`."""
        if not candidates:
            return
        call = asyncio.create_task(self._score(scorer, candidates, rewards))
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)

    async def cancel(self) -> None:
        """Gives up the calls still out."""
        calls = list(self._calls)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)

    def rewarded(self, candidates: Sequence[Candidate]) -> list[ScoredCandidate]:
        """These candidates with their rewards so far, NaN where there is none."""
        return [ScoredCandidate(one, self._rewards.get(one.index, math.nan)) for one in candidates]

    async def _score(self, scorer: Scorer, candidates: Sequence[Candidate], rewards: dict[int, float]) -> None:
        try:
            with self._busy:
                scores = await scorer.score(self._prompt, candidates)
        except ScoringError as error:
            self.failure = error
            return
        self.scored_tokens += scores.scored_tokens
        self.prompt_tokens_cut = max(self.prompt_tokens_cut, scores.prompt_tokens_cut)
        rewards.update(zip((one.index for one in candidates), scores.rewards_N, strict=True))
        if self._on_reward is not None and rewards is self._rewards:  # beginnings are no candidates yet
            for one in self.rewarded(candidates):
                self._on_reward(one)


def sampling_for(scorer: Scorer | None, asked: SamplingParams, *, ranks_by_logprob: bool) -> SamplingParams:
    """The sampling to generate with: what was asked, and what the scorer, or the fallback for it, needs beside it."""
    if scorer is None:
        return asked
    top = scorer.needs.top_logprobs
    return replace(
        asked,
        likelihood=asked.likelihood or scorer.needs.likelihood or ranks_by_logprob,
        logprobs=top if top > (asked.logprobs or 0) else asked.logprobs,
    )


@overload
def as_asked(outcome: Candidate, asked: SamplingParams) -> Candidate: ...
@overload
def as_asked(outcome: Outcome, asked: SamplingParams) -> Outcome: ...
def as_asked(outcome: Outcome, asked: SamplingParams) -> Outcome:
    """The outcome with the log-probabilities that were asked for, and no more."""
    if isinstance(outcome, FailedCandidate) or outcome.logprobs is None:
        return outcome
    if asked.logprobs is None:
        return replace(outcome, logprobs=None)
    return replace(outcome, logprobs=tuple(replace(one, top=one.top[: asked.logprobs]) for one in outcome.logprobs))
