"""An observer of runs that records its calls."""

from reranker.candidate import Candidate, ScoredCandidate
from server.generation.base import Outcome
from server.pipeline.types import BestOfNRequest, BestOfNResult, RunObserver


class RecordingObserver(RunObserver):
    """Records the argument of every call, in order, by method."""

    def __init__(self, *, streams_partial: bool = False) -> None:
        self.streams_partial = streams_partial
        self.requests: list[BestOfNRequest] = []
        self.outcomes: list[Outcome] = []
        self.rewards: list[ScoredCandidate] = []
        self.blocks: list[Candidate] = []
        self.results: list[BestOfNResult] = []

    def started(self, request: BestOfNRequest) -> None:
        self.requests.append(request)

    def outcome(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)

    def reward(self, scored: ScoredCandidate) -> None:
        self.rewards.append(scored)

    def block(self, chosen: Candidate) -> None:
        self.blocks.append(chosen)

    def finished(self, result: BestOfNResult) -> None:
        self.results.append(result)
