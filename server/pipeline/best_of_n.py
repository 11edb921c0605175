"""Best-of-N, the whole of it: plan, generate, score as candidates finish, select."""

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from reranker import selection
from reranker.candidate import Candidate, FailedCandidate, Prompt, ScoredCandidate, Selection
from reranker.scorers.base import Scorer
from reranker.stopping import Policy, Stopping
from server.errors import BadRequestError, DeadlineError, GenerationError, RewardError
from server.generation.base import Generator, Outcome, SamplingParams
from server.pipeline.sampling import CandidateSampler
from server.pipeline.scoring import Scoring, as_asked, sampling_for
from server.pipeline.strategies import READ_TEXTS, WITHOUT_REWARDS, RankedBy, SelectionOptions, Strategy, select

RewardFailurePolicy = Literal["error", "logprob", "first"]
StoppedBy = Literal["all", "deadline"] | Policy


@dataclass(frozen=True, slots=True)
class BestOfNRequest:
    """One question to be answered with the best of `best_of` candidates.

    `stopping` may find fewer enough. `reward_model` None is the first one served; `majority` asks none. When
    `deadline_s` seconds have passed the best finished so far wins.
    """

    prompt: Prompt
    sampling: SamplingParams
    best_of: int
    reward_model: str | None = None
    strategy: Strategy = "argmax"
    selection: SelectionOptions = field(default_factory=SelectionOptions)
    deadline_s: float | None = None
    stopping: Stopping = field(default_factory=Stopping)
    on_reward_failure: RewardFailurePolicy = "error"

    @property
    def at_once(self) -> int:
        """So many of its candidates are under way at the same time, at most."""
        return self.stopping.at_once(self.best_of)


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds of one request; generating and scoring overlap, so the parts do not add up to `total`.

    `queue` is the wait for admission and until the first candidate is under way, `generate` is from then to the last
    candidate, `score` the time in which at least one scorer call was out, `select` the selection alone.
    """

    queue: float
    generate: float
    score: float
    select: float
    total: float


@dataclass(frozen=True, slots=True)
class BestOfNResult:
    """The candidates, best first, and the account of the request.

    completed + failed + cancelled + not_drawn = best_of. `ranked_by` tells what ordered the candidates: the reward or
    the votes for an answer, as the strategy does it, or what stood in for them: after a reward failure the fallback
    that the request asked for, where there is no answer to vote on the reward, and without one the order of drawing.
    `generated_tokens` are those of completed candidates, and of those that the stopping policy watched and gave up.
    `reward_model` is None where the strategy asks none. `candidate_s` is what the request cost the engine: the seconds
    that each candidate was under way, added up, whether it completed, failed or was cancelled.
    Of an answer in several `blocks` the candidates are those of the last one, and the cost is that of all.
    """

    selection: Selection
    best_of: int
    completed: int
    failed: int
    cancelled: int
    not_drawn: int
    strategy: Strategy
    reward_model: str | None
    ranked_by: RankedBy
    stopped_by: StoppedBy
    prompt_tokens: int
    generated_tokens: int
    scored_tokens: int
    prompt_tokens_cut: int
    candidate_s: float
    timings: Timings
    blocks: int = 1


class BestOfN:
    """Runs requests against one generator and the scorers served beside it; the first scorer is the default."""

    def __init__(self, generator: Generator, scorers: Mapping[str, Scorer]) -> None:
        self.generator = generator
        self.scorers = scorers

    async def check_ready(self) -> None:
        """Returns if a request could be answered now.

        Raises:
            server.errors.NotReadyError: with the reason.
        """
        await self.generator.check_ready()

    async def run(
        self,
        request: BestOfNRequest,
        on_candidate: Callable[[Outcome], None] | None = None,
        on_reward: Callable[[ScoredCandidate], None] | None = None,
        *,
        stream_partial: bool = True,
        queued_s: float = 0.0,
    ) -> BestOfNResult:
        """Answers one request: each candidate is scored as soon as it has finished, while others are still written.

        `on_candidate` hears of every candidate that finishes or fails, and with `stream_partial` for `best_of` 1 also of its
        stream_partial, which costs the engine a message a token; `on_reward` hears of every candidate that has been scored.
        `queued_s` is how long the request has waited for admission before; it counts towards its deadline and its
        timings.
        Cancelling this coroutine cancels the candidates in the engine.

        Raises:
            server.errors.NbestError: see there.
        """
        began_s = generated_s = time.perf_counter()
        arrived_s = began_s - queued_s
        scorer = None if request.strategy in WITHOUT_REWARDS else self.scorer(request.reward_model)
        _check_stopping(request.stopping, scorer)
        scoring = Scoring(scorer, request.prompt, on_reward)
        stream_partial = stream_partial and on_candidate is not None and request.best_of == 1
        sampling = sampling_for(scorer, request.sampling, ranks_by_logprob=request.on_reward_failure == "logprob")
        drawing = CandidateSampler(
            self.generator,
            request.prompt,
            sampling,
            request.best_of,
            request.stopping,
            scoring,
            stream_partial=stream_partial,
        )
        completed: list[Candidate] = []
        failed: list[FailedCandidate] = []
        deadline = asyncio.timeout(None if request.deadline_s is None else request.deadline_s - queued_s)
        try:
            async with deadline, drawing:
                began_s = generated_s = time.perf_counter()
                async for outcomes in drawing:
                    generated_s = time.perf_counter()
                    finished = [one for one in outcomes if isinstance(one, Candidate) and one.finish_reason]
                    scoring.start(finished)
                    completed += [as_asked(one, request.sampling) for one in finished]
                    failed += [one for one in outcomes if isinstance(one, FailedCandidate)]
                    if on_candidate is not None:
                        for outcome in outcomes:
                            on_candidate(as_asked(outcome, request.sampling))
                await scoring.finish()
        except TimeoutError:
            if not deadline.expired():  # somebody else's time was up
                raise
        finally:
            await scoring.cancel()

        stopped_by: StoppedBy = "all"
        if deadline.expired():
            stopped_by = "deadline"
        elif request.stopping.policy is not None and len(completed) + len(failed) < request.best_of:
            stopped_by = request.stopping.policy
        if not completed:
            raise _nothing_finished(request, failed, stopped_by)
        selecting_s = time.perf_counter()
        choose = partial(_select, request, scoring, completed, stopped_by)
        ranking, ranked_by = await asyncio.to_thread(choose) if request.strategy in READ_TEXTS else choose()
        ended_s = time.perf_counter()
        return BestOfNResult(
            selection=ranking,
            best_of=request.best_of,
            completed=len(completed),
            failed=len(failed),
            cancelled=drawing.drawn - len(completed) - len(failed),
            not_drawn=request.best_of - drawing.drawn,
            strategy=request.strategy,
            reward_model=scorer.name if scorer else None,
            ranked_by=ranked_by,
            stopped_by=stopped_by,
            prompt_tokens=drawing.prompt_tokens,
            generated_tokens=sum(one.num_tokens - request.sampling.begun_tokens for one in completed)
            + drawing.cancelled_tokens,
            scored_tokens=scoring.scored_tokens,
            prompt_tokens_cut=scoring.prompt_tokens_cut,
            candidate_s=drawing.candidate_s,
            timings=Timings(
                queue=began_s - arrived_s,
                generate=generated_s - began_s,
                score=scoring.busy_s,
                select=ended_s - selecting_s,
                total=ended_s - arrived_s,
            ),
        )

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
    """Refuses a policy that would wait for rewards which come only when all candidates are there."""
    if stopping.reads_rewards and scorer is not None and scorer.needs.all_candidates:
        raise BadRequestError(
            f"{stopping.policy} reads rewards as candidates end, and {scorer.name} compares all of them at the end; "
            "name another reward_model, or leave stopping out.",
            param="nbest.stopping",
        )


def _nothing_finished(
    request: BestOfNRequest, failed: list[FailedCandidate], stopped_by: StoppedBy
) -> DeadlineError | GenerationError:
    if stopped_by == "deadline":
        return DeadlineError(
            f"No candidate finished within deadline_s={request.deadline_s:g}; allow more time or fewer max_tokens."
        )
    reasons = "; ".join(sorted({one.reason for one in failed}))
    return GenerationError(f"All {request.best_of} candidates failed: {reasons}. Try again.")


def _select(
    request: BestOfNRequest, scoring: Scoring, completed: list[Candidate], stopped_by: StoppedBy
) -> tuple[Selection, RankedBy]:
    """The ranking by the strategy, or where it lacks every reward the fallback that the request asked for.

    A deadline that leaves candidates finished but not one scored is still answered, in the order of drawing.
    """
    scored = scoring.rewarded(completed)
    if request.strategy in WITHOUT_REWARDS or any(one.has_reward for one in scored):
        return select(request.strategy, request.selection, scored, request.sampling.seed)
    if request.on_reward_failure == "logprob":
        return selection.by_logprob(scored), "logprob"
    if request.on_reward_failure == "first" or stopped_by == "deadline":
        return selection.by_index(scored), "first"
    reason = scoring.failure or "it returned no number for any candidate"
    raise RewardError(
        f"The reward model failed: {reason}. Try again, or set nbest.on_reward_failure to logprob or first."
    )
