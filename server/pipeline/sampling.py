"""The sampling of one request: all candidates at once, or as its stopping policy decides.

The waves of a policy are generations one after another for the same prompt. Candidate i has the seed of the request + i
in whatever wave it is drawn, so a policy that stops after k candidates has drawn the first k of plain best-of-N.

A candidate that a policy rejects is cancelled in the engine before anything else is waited for.
"""

import math
import time
from collections.abc import AsyncIterator, Collection
from dataclasses import replace
from types import TracebackType
from typing import Self

from reranker.candidate import Candidate, FailedCandidate, Prompt
from reranker.stopping import SpeculativeRejection, Stopping
from server.generation.base import Generator, Outcome, SamplingParams
from server.pipeline.scoring import Scoring


class CandidateSampler:
    """At most `best_of` candidates of one prompt. Iterate inside `async with`; leaving it cancels what still runs.

    The caller starts the scoring of the candidates that have ended before it takes the next outcomes: the policy waits
    for their rewards. Growing candidates are yielded with `stream_partial` only.

    `candidate_s` is the time that each candidate ran, added up. `cancelled_tokens` are the tokens of candidates that
    were cancelled, as far as they were watched.
    """

    def __init__(
        self,
        generator: Generator,
        prompt: Prompt,
        sampling: SamplingParams,
        best_of: int,
        stopping: Stopping,
        scoring: Scoring,
        *,
        stream_partial: bool,
    ) -> None:
        self.drawn = 0
        self.candidate_s = 0.0
        self._generator = generator
        self._prompt = prompt
        self._sampling = sampling
        self._best_of = best_of
        self._stopping = stopping
        self._scoring = scoring
        self._stream_partial = stream_partial
        self._watches = stream_partial or stopping.gives_up
        self._is_open = False
        self._first = 0  # index of the first candidate of this wave
        self._completed: list[int] = []
        self._running: set[int] = set()
        self._unended_tokens: dict[int, int] = {}  # index -> tokens so far, of growing and cancelled candidates
        self._counted_s = 0.0

    @property
    def prompt_tokens(self) -> int:
        return self._generation.prompt_tokens

    @property
    def _completed_of_wave(self) -> list[int]:
        return [index for index in self._completed if index >= self._first]

    @property
    def cancelled_tokens(self) -> int:
        return sum(self._unended_tokens.values())

    async def __aenter__(self) -> Self:
        await self._draw(await self._next_wave())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._end_wave()

    async def __aiter__(self) -> AsyncIterator[list[Outcome]]:
        while True:
            beginnings = _Beginnings(self._stopping.rejection, self._scoring)
            async for outcomes in self._generation:
                self._count()
                if self._first:
                    outcomes = [replace(outcome, index=self._first + outcome.index) for outcome in outcomes]
                for outcome in outcomes:
                    self._note(outcome)
                    beginnings.note(outcome)
                if yielded := [outcome for outcome in outcomes if self._stream_partial or _has_ended(outcome)]:
                    yield yielded
                for index in await beginnings.rejected(self._running, self._completed_of_wave):
                    await self._generation.cancel(index - self._first)
                    self._count()
                    self._running.discard(index)
                if await self._is_enough():
                    break
            await self._end_wave()
            if not (wave := await self._next_wave()):
                return
            await self._draw(wave)

    async def _next_wave(self) -> int:
        if self._stopping.waves is None:
            return self._best_of - self.drawn
        rewards = await self._scoring.settled()
        return self._stopping.waves.next_wave([rewards.get(index, math.nan) for index in range(self.drawn)])

    async def _draw(self, wave: int) -> None:
        seed = None if self._sampling.seed is None else self._sampling.seed + self.drawn
        sampling = replace(self._sampling, seed=seed)
        generation = self._generator.generate(self._prompt, sampling, wave, stream_partial=self._watches)
        await generation.__aenter__()
        self._generation, self._is_open = generation, True
        self._counted_s = time.perf_counter()
        self._first, self.drawn = self.drawn, self.drawn + wave
        self._running = set(range(self._first, self.drawn))

    async def _end_wave(self) -> None:
        """Cancels what still runs of the wave; the second call does nothing."""
        is_open, self._is_open = self._is_open, False
        try:
            if is_open:
                await self._generation.__aexit__(None, None, None)
        finally:
            self._count()
            self._running.clear()

    def _note(self, outcome: Outcome) -> None:
        if _has_ended(outcome):
            self._running.discard(outcome.index)
            self._unended_tokens.pop(outcome.index, None)
        if isinstance(outcome, Candidate):
            if outcome.finish_reason:
                self._completed.append(outcome.index)
            else:
                self._unended_tokens[outcome.index] = outcome.num_tokens

    def _count(self) -> None:
        before_s, self._counted_s = self._counted_s, time.perf_counter()
        self.candidate_s += len(self._running) * (self._counted_s - before_s)

    async def _is_enough(self) -> bool:
        cut = self._stopping.stragglers
        if cut is None:
            return False
        rewards = {} if cut.target_reward is None else await self._scoring.settled()
        return cut.is_enough([rewards.get(index, math.nan) for index in self._completed], self.drawn)


class _Beginnings:
    """The beginnings of a wave's candidates, collected until all have reached the length of the next checkpoint."""

    def __init__(self, rejection: SpeculativeRejection | None, scoring: Scoring) -> None:
        self._rejection = rejection
        self._scoring = scoring
        self._checkpoints = list(rejection.checkpoints) if rejection else []
        self._reached: dict[int, Candidate] = {}

    def note(self, outcome: Outcome) -> None:
        if self._checkpoints and isinstance(outcome, Candidate) and outcome.num_tokens >= self._checkpoints[0]:
            self._reached.setdefault(outcome.index, outcome)

    async def rejected(self, running: Collection[int], completed: Collection[int]) -> list[int]:
        """The indices to cancel now: at most once for each checkpoint, when the last candidate has reached it."""
        if self._rejection is None or not self._checkpoints or not running or not self._reached.keys() >= set(running):
            return []
        del self._checkpoints[0]
        beginnings = [self._reached[index] for index in sorted(running)]
        self._reached.clear()
        growing = await self._scoring.beginnings(beginnings)
        rewards = await self._scoring.settled()
        return self._rejection.rejected(growing, [rewards.get(index, math.nan) for index in completed])


def _has_ended(outcome: Outcome) -> bool:
    return isinstance(outcome, FailedCandidate) or outcome.finish_reason is not None
