"""The request of best-of-N, its result, and the observer that is called while it runs."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Self

from reranker.candidate import Candidate, FailedCandidate, Prompt, ScoredCandidate, Selection
from reranker.stopping import Policy, Stopping
from server.generation.base import Outcome, SamplingParams
from server.pipeline.sampling import CandidateSampler
from server.pipeline.scoring import Scoring
from server.pipeline.strategies import RankedBy, SelectionOptions, Strategy

RewardFailurePolicy = Literal["error", "logprob", "first"]
StoppedBy = Literal["all", "deadline"] | Policy


@dataclass(frozen=True, slots=True)
class BestOfNRequest:
    """A prompt to be answered with the best of `best_of` candidates.

    A `stopping` policy may end the sampling earlier. `reward_model` None is the first scorer that is served; the
    strategy `majority` uses none. After `deadline_s` seconds the best candidate finished so far wins.
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
        """The most candidates of this request that run at the same time."""
        return self.stopping.at_once(self.best_of)


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds of one request; generating and scoring overlap, so the parts do not add up to `total`.

    `queue` is the wait for admission and until the first candidate runs, `generate` is from then to the end of the last
    candidate, `score` the time in which at least one scorer call was running, `select` the selection alone.
    """

    queue: float
    generate: float
    score: float
    select: float
    total: float


@dataclass(frozen=True, slots=True)
class BestOfNResult:
    """The candidates, best first, and the account of the request.

    completed + failed + cancelled + not_drawn = best_of. `ranked_by` says what ordered the candidates: the reward or
    the votes for an answer, as the strategy does, or the replacement for them: after a reward failure the fallback of
    the request, the reward where no candidate had an answer to vote for, and without a reward the order of drawing.
    `generated_tokens` are those of completed candidates and of those that the stopping policy watched and cancelled.
    `reward_model` is None where the strategy uses none. `candidate_s` is what the request cost the engine: the seconds
    that each candidate ran, added up, whether it completed, failed or was cancelled.
    With several `blocks` the candidates are those of the last block, and the cost is that of all blocks.
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

    @classmethod
    def of(
        cls,
        request: BestOfNRequest,
        selection: Selection,
        *,
        ranked_by: RankedBy,
        stopped_by: StoppedBy,
        sampler: CandidateSampler,
        scoring: Scoring,
        completed: Sequence[Candidate],
        failed: Sequence[FailedCandidate],
        timings: Timings,
    ) -> Self:
        """The account of one run, from the parts that did the work."""
        new_tokens = sum(candidate.num_tokens - request.sampling.begun_tokens for candidate in completed)
        return cls(
            selection=selection,
            best_of=request.best_of,
            completed=len(completed),
            failed=len(failed),
            cancelled=sampler.drawn - len(completed) - len(failed),
            not_drawn=request.best_of - sampler.drawn,
            strategy=request.strategy,
            reward_model=scoring.reward_model,
            ranked_by=ranked_by,
            stopped_by=stopped_by,
            prompt_tokens=sampler.prompt_tokens,
            generated_tokens=new_tokens + sampler.cancelled_tokens,
            scored_tokens=scoring.scored_tokens,
            prompt_tokens_cut=scoring.prompt_tokens_cut,
            candidate_s=sampler.candidate_s,
            timings=timings,
        )


class RunObserver:
    """Called while a request runs; every method does nothing unless a subclass overrides it.

    The run enters the observer as a context manager before its first candidate, and leaves it with the error that ended
    the run, if any. With blocks, `started` and `outcome` are called for the candidates of each block.
    """

    streams_partial = False
    """Whether `outcome` is also called for a growing candidate, which costs the engine a message a token. Only a
    request with `best_of` 1 does so."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The run has ended, with a result or with this error."""

    def started(self, request: BestOfNRequest) -> None:
        """The engine has accepted the candidates of this request, or of this block of it."""

    def outcome(self, outcome: Outcome) -> None:
        """A candidate has finished, failed or, with `streams_partial`, grown."""

    def reward(self, scored: ScoredCandidate) -> None:
        """A finished candidate has been scored."""

    def block(self, chosen: Candidate) -> None:
        """A block other than the last has been chosen; the candidate holds the answer so far."""

    def finished(self, result: BestOfNResult) -> None:
        """The request has its result."""


class RunObservers(RunObserver):
    """Several observers of the same run, called in order."""

    def __init__(self, *observers: RunObserver) -> None:
        self.streams_partial = any(observer.streams_partial for observer in observers)
        self._observers = observers
        self._exits = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as entered:
            for observer in self._observers:
                entered.enter_context(observer)
            self._exits = entered.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exits.__exit__(kind, error, trace)

    def started(self, request: BestOfNRequest) -> None:
        for observer in self._observers:
            observer.started(request)

    def outcome(self, outcome: Outcome) -> None:
        for observer in self._observers:
            observer.outcome(outcome)

    def reward(self, scored: ScoredCandidate) -> None:
        for observer in self._observers:
            observer.reward(scored)

    def block(self, chosen: Candidate) -> None:
        for observer in self._observers:
            observer.block(chosen)

    def finished(self, result: BestOfNResult) -> None:
        for observer in self._observers:
            observer.finished(result)
