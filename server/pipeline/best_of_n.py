"""Best-of-N: sample candidates, score each as it finishes, select the winner."""

import asyncio
import copy
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Self

from reranker import selection
from reranker.candidate import Candidate, FailedCandidate, Selection
from reranker.scorers.base import Scorer, UnscorableError
from reranker.stopping import Stopping
from server.errors import BadRequestError, DeadlineError, GenerationError, NbestError, RewardError
from server.generation.base import Generator
from server.pipeline import blockwise
from server.pipeline.sampling import CandidateSampler
from server.pipeline.scoring import Scoring, as_bad_request, as_requested, sampling_for
from server.pipeline.strategies import READ_TEXTS, WITHOUT_REWARDS, RankedBy, select
from server.pipeline.types import BestOfNRequest, BestOfNResult, RunObserver, RunObservers, StoppedBy, Timings

ObserverOf = Callable[[BestOfNRequest, float], RunObserver]
"""Makes the observer of a request that has waited this many seconds for admission."""


class BestOfN:
    """Runs requests against one generator and the scorers served beside it; the first scorer is the default."""

    def __init__(self, generator: Generator, scorers: Mapping[str, Scorer]) -> None:
        self.generator = generator
        self.scorers = scorers
        self._observer_of: ObserverOf | None = None

    def instrumented(self, generator: Generator, scorers: Mapping[str, Scorer], observer_of: ObserverOf) -> Self:
        """The same pipeline with this generator and these scorers, and with an observer for every run."""
        instrumented = copy.copy(self)
        instrumented.generator, instrumented.scorers = generator, scorers
        instrumented._observer_of = observer_of
        return instrumented

    async def check_ready(self) -> None:
        """Returns if a request could be answered now.

        Raises:
            server.errors.NotReadyError: it could not; the message is the reason.
        """
        await self.generator.check_ready()

    async def run(
        self, request: BestOfNRequest, observer: RunObserver | None = None, *, queued_s: float = 0.0
    ) -> BestOfNResult:
        """Answers one request; the strategy `blockwise` runs best-of-N for each block.

        `queued_s` is how long the request has waited for admission; it counts towards its deadline and its timings.
        Cancelling this coroutine cancels the candidates in the engine.

        Raises:
            server.errors.NbestError: the request is invalid or cannot be answered; the subclass says which.
        """
        observers = [observer] if observer else []
        if self._observer_of is not None:
            observers.insert(0, self._observer_of(request, queued_s))
        with RunObservers(*observers) as calls:
            await self._check_prompt(request)
            if request.strategy == "blockwise":
                result = await blockwise.run(partial(self._run, observer=calls), request, calls, queued_s)
            else:
                result = await self._run(request, queued_s, observer=calls)
            calls.finished(result)
        return result

    async def _run(self, request: BestOfNRequest, queued_s: float, *, observer: RunObserver) -> BestOfNResult:
        """Samples, scores each candidate while others are still generated, and selects."""
        arrived_s = time.perf_counter() - queued_s
        scorer = None if request.strategy in WITHOUT_REWARDS else self.scorer(request.reward_model)
        _check_stopping(request.stopping, scorer)
        scoring = Scoring(scorer, request.prompt, observer.reward)
        sampling = sampling_for(scorer, request.sampling, ranks_by_logprob=request.on_reward_failure == "logprob")
        whole_answers = request.best_of > 1 or sampling.block_tokens is not None
        sampler = CandidateSampler(
            self.generator,
            request.prompt,
            sampling,
            request.best_of,
            request.stopping,
            scoring,
            stream_partial=observer.streams_partial and not whole_answers,
        )
        completed: list[Candidate] = []
        failed: list[FailedCandidate] = []
        began_s = generated_s = time.perf_counter()
        deadline = asyncio.timeout(None if request.deadline_s is None else request.deadline_s - queued_s)
        try:
            async with deadline, sampler:
                began_s = generated_s = time.perf_counter()
                observer.started(request)
                async for outcomes in sampler:
                    generated_s = time.perf_counter()
                    scoring.start(
                        [outcome for outcome in outcomes if isinstance(outcome, Candidate) and outcome.finish_reason]
                    )
                    for outcome in (as_requested(outcome, request.sampling) for outcome in outcomes):
                        if isinstance(outcome, FailedCandidate):
                            failed.append(outcome)
                        elif outcome.finish_reason:
                            completed.append(outcome)
                        observer.outcome(outcome)
                await scoring.finish()
        except TimeoutError:
            if not deadline.expired():  # a timeout of the generator or the scorer
                raise
        finally:
            await scoring.cancel()

        stopped_by = _stopped_by(request, len(completed) + len(failed), deadline_expired=deadline.expired())
        if not completed:
            raise _nothing_finished(request, failed, stopped_by)
        selecting_s = time.perf_counter()
        choose = partial(_select, request, scoring, completed, stopped_by)
        ranking, ranked_by = await asyncio.to_thread(choose) if request.strategy in READ_TEXTS else choose()
        ended_s = time.perf_counter()
        return BestOfNResult.of(
            request,
            ranking,
            ranked_by=ranked_by,
            stopped_by=stopped_by,
            sampler=sampler,
            scoring=scoring,
            completed=completed,
            failed=failed,
            timings=Timings(
                queue=began_s - arrived_s,
                generate=generated_s - began_s,
                score=scoring.busy_s,
                select=ended_s - selecting_s,
                total=ended_s - arrived_s,
            ),
        )

    async def _check_prompt(self, request: BestOfNRequest) -> None:
        """Refuses a prompt that the reward model cannot read, unless the request accepts candidates without rewards."""
        if request.strategy not in WITHOUT_REWARDS and request.on_reward_failure == "error":
            try:
                await self.scorer(request.reward_model).check(request.prompt)
            except UnscorableError as error:
                raise as_bad_request(error, request.prompt, "max_tokens") from error

    def scorer(self, name: str | None) -> Scorer:
        """The scorer of that name, or the default.

        Raises:
            BadRequestError: it is not served.
        """
        if name is None:
            return next(iter(self.scorers.values()))
        if name not in self.scorers:
            served = ", ".join(self.scorers)
            raise BadRequestError(f"No reward model {name!r} is served; choose one of: {served}.", param="reward_model")
        return self.scorers[name]


def _check_stopping(stopping: Stopping, scorer: Scorer | None) -> None:
    """Refuses a policy that would wait for rewards which come only when all candidates have finished."""
    if stopping.reads_rewards and scorer is not None and scorer.needs.all_candidates:
        raise BadRequestError(
            f"{stopping.policy} reads rewards as candidates end, and {scorer.name} compares all of them at the end; "
            "name another reward_model, or leave stopping out.",
            param="nbest.stopping",
        )


def _stopped_by(request: BestOfNRequest, num_ended: int, *, deadline_expired: bool) -> StoppedBy:
    if deadline_expired:
        return "deadline"
    if request.stopping.policy is not None and num_ended < request.best_of:
        return request.stopping.policy
    return "all"


def _nothing_finished(request: BestOfNRequest, failed: Sequence[FailedCandidate], stopped_by: StoppedBy) -> NbestError:
    if stopped_by == "deadline":
        return DeadlineError(
            f"No candidate finished within deadline_s={request.deadline_s:g}; allow more time or fewer max_tokens."
        )
    reasons = "; ".join(sorted({candidate.reason for candidate in failed}))
    return GenerationError(f"All {request.best_of} candidates failed: {reasons}. Try again.")


def _select(
    request: BestOfNRequest, scoring: Scoring, completed: Sequence[Candidate], stopped_by: StoppedBy
) -> tuple[Selection, RankedBy]:
    """The ranking by the strategy or, where no candidate has a reward, by the fallback of the request.

    A deadline that leaves finished candidates and no reward is still answered, in the order of drawing.
    """
    scored = scoring.rewarded(completed)
    if request.strategy in WITHOUT_REWARDS or any(candidate.has_reward for candidate in scored):
        return select(request.strategy, request.selection, scored, request.sampling.seed)
    if request.on_reward_failure == "logprob":
        return selection.by_logprob(scored), "logprob"
    if request.on_reward_failure == "first" or stopped_by == "deadline":
        return selection.by_index(scored), "first"
    if isinstance(scoring.failure, UnscorableError):
        raise as_bad_request(scoring.failure, request.prompt, "max_tokens")
    reason = scoring.failure or "it returned no number for any candidate"
    raise RewardError(
        f"The reward model failed: {reason}. Try again, or set nbest.on_reward_failure to logprob or first."
    )
