"""Samples the candidates of one request: all at once, or as its stopping policy decides.

A policy with waves starts one generation after another for the same prompt. Candidate i has the seed of the request + i
in every wave, so a policy that stops after k candidates has drawn the first k of plain best-of-N.

A candidate that a policy rejects is cancelled in the engine before anything else is awaited.
"""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Collection
from dataclasses import replace
from types import TracebackType
from typing import Self

from reranker.candidate import Candidate, FailedCandidate, Prompt
from reranker.stopping import SpeculativeRejection, Stopping
from server.generation.base import Generator, Outcome, SamplingParams
from server.generation.structured_output import OutputSchema
from server.pipeline.scoring import Scoring


class CandidateSampler:
    """Draws at most `best_of` candidates of one prompt and yields their outcomes.

    It is iterated inside `async with`; leaving that block cancels the candidates that still run. The caller must start
    the scoring of yielded candidates before it reads the next outcomes, because the policy waits for their rewards.
    Growing candidates are yielded only with `stream_partial`.

    `drawn` is the number of candidates that were started. `candidate_s` is the sum of the seconds that each candidate
    ran.
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
        self._schema: OutputSchema | None = None
        self._stream_partial = stream_partial
        self._reads_partial = stream_partial or stopping.cancels_running
        self._is_open = False
        self._first = 0  # index of the first candidate of this wave
        self._completed: list[int] = []
        self._running: set[int] = set()
        self._unfinished_tokens: dict[int, int] = {}  # index -> tokens so far, of growing and cancelled candidates
        self._counted_until_s = 0.0

    @property
    def prompt_tokens(self) -> int:
        return self._generation.prompt_tokens

    @property
    def _completed_of_wave(self) -> list[int]:
        return [index for index in self._completed if index >= self._first]

    @property
    def cancelled_tokens(self) -> int:
        """Tokens of the cancelled candidates; 0 if neither the caller nor the policy reads growing candidates."""
        return sum(self._unfinished_tokens.values())

    async def __aenter__(self) -> Self:
        if self._sampling.json_schema is not None:
            self._schema = await asyncio.to_thread(OutputSchema, self._sampling.json_schema)
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
                self._count_seconds()
                if self._first:
                    outcomes = [replace(outcome, index=self._first + outcome.index) for outcome in outcomes]
                if self._schema is not None:
                    outcomes = [_validated(outcome, self._schema) for outcome in outcomes]
                for outcome in outcomes:
                    self._record(outcome)
                    beginnings.add(outcome)
                if yielded := [outcome for outcome in outcomes if self._stream_partial or _has_ended(outcome)]:
                    yield yielded
                for index in await beginnings.rejected(self._running, self._completed_of_wave):
                    await self._generation.cancel(index - self._first)
                    self._count_seconds()
                    self._running.discard(index)
                if await self._is_enough():
                    break
            await self._end_wave()
            if not (size := await self._next_wave()):
                return
            await self._draw(size)

    async def _next_wave(self) -> int:
        """The size of the next wave; 0 means stop."""
        if self._stopping.waves is None:
            return self._best_of - self.drawn
        rewards = await self._scoring.settled()
        return self._stopping.waves.next_wave([rewards.get(index, math.nan) for index in range(self.drawn)])

    async def _draw(self, size: int) -> None:
        """Starts a wave of this size."""
        seed = None if self._sampling.seed is None else self._sampling.seed + self.drawn
        sampling = replace(self._sampling, seed=seed)
        generation = self._generator.generate(self._prompt, sampling, size, stream_partial=self._reads_partial)
        await generation.__aenter__()
        self._generation, self._is_open = generation, True
        self._counted_until_s = time.perf_counter()
        self._first, self.drawn = self.drawn, self.drawn + size
        self._running = set(range(self._first, self.drawn))

    async def _end_wave(self) -> None:
        """Cancels the candidates of the wave that still run; a second call does nothing."""
        is_open, self._is_open = self._is_open, False
        try:
            if is_open:
                await self._generation.__aexit__(None, None, None)
        finally:
            self._count_seconds()
            self._running.clear()

    def _record(self, outcome: Outcome) -> None:
        if _has_ended(outcome):
            self._running.discard(outcome.index)
            self._unfinished_tokens.pop(outcome.index, None)
        if isinstance(outcome, Candidate):
            if outcome.finish_reason:
                self._completed.append(outcome.index)
            else:
                self._unfinished_tokens[outcome.index] = outcome.num_tokens

    def _count_seconds(self) -> None:
        """Adds the seconds of the running candidates since the last call to `candidate_s`."""
        before_s, self._counted_until_s = self._counted_until_s, time.perf_counter()
        self.candidate_s += len(self._running) * (self._counted_until_s - before_s)

    async def _is_enough(self) -> bool:
        """Whether the policy cancels the candidates that still run."""
        cut = self._stopping.stragglers
        if cut is None:
            return False
        rewards = {} if cut.target_reward is None else await self._scoring.settled()
        return cut.is_enough([rewards.get(index, math.nan) for index in self._completed], self.drawn)


class _Beginnings:
    """Collects a wave's growing candidates until each running one has reached the length of the next checkpoint."""

    def __init__(self, rejection: SpeculativeRejection | None, scoring: Scoring) -> None:
        self._rejection = rejection
        self._scoring = scoring
        self._checkpoints = list(rejection.checkpoints) if rejection else []
        self._reached: dict[int, Candidate] = {}

    def add(self, outcome: Outcome) -> None:
        if self._checkpoints and isinstance(outcome, Candidate) and outcome.num_tokens >= self._checkpoints[0]:
            self._reached.setdefault(outcome.index, outcome)

    async def rejected(self, running: Collection[int], completed: Collection[int]) -> list[int]:
        """The indices to cancel now; empty unless the last running candidate has just reached the checkpoint."""
        if self._rejection is None or not self._checkpoints or not running or not self._reached.keys() >= set(running):
            return []
        del self._checkpoints[0]
        beginnings = [self._reached[index] for index in sorted(running)]
        self._reached.clear()
        growing = await self._scoring.beginnings(beginnings)
        rewards = await self._scoring.settled()
        return self._rejection.rejected(growing, [rewards.get(index, math.nan) for index in completed])


def _validated(outcome: Outcome, schema: OutputSchema) -> Outcome:
    """The outcome; a candidate that stopped with a text that does not satisfy the schema has failed."""
    if isinstance(outcome, FailedCandidate) or outcome.finish_reason != "stop":
        return outcome
    error = schema.error(outcome.text)
    return outcome if error is None else FailedCandidate(outcome.index, error)


def _has_ended(outcome: Outcome) -> bool:
    return isinstance(outcome, FailedCandidate) or outcome.finish_reason is not None
