"""The Prometheus metrics of the server; the help text of each has its formula and unit.

The stages report durations, never timestamps, so the values are also correct when the stages run in different
processes. `RunMetrics` observes a run and counts each candidate when it ends, not when its request ends. So the same
code counts the candidates of an answer, of a deadline and of a client that disconnected.
"""

import math
from collections.abc import Iterator, Mapping
from types import TracebackType

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from reranker.candidate import FailedCandidate
from server.errors import RewardError, ShedReason
from server.generation.base import Outcome
from server.pipeline.types import BestOfNRequest, BestOfNResult, RunObserver

READY = "nbest_ready"
SECONDS = (0.001, 0.005, 0.025, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
REWARDS = (-10, -5, -3, -2, -1, -0.5, 0, 0.5, 1, 2, 3, 5, 10)
"""Most reward models have a spread of about 1; some return values in the tens."""
REWARD_GAINS = (0, 0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10)
REQUEST_TOKENS = (16, 64, 256, 1024, 4096, 16384, 65536)
BATCH_SEQUENCES = (1, 2, 4, 8, 16, 32, 64, 128)
BATCH_TOKENS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


class Metrics:
    """The metrics of one server, in their own registry."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = self._counter(
            "nbest_requests",
            "HTTP requests answered, by route and status; 499 if the client disconnected before the status. Count.",
            "endpoint",
            "status",
        )
        candidates = self._counter(
            "nbest_candidates",
            "Candidates that ended: completed, failed in the engine, or cancelled (by a deadline, a stopping policy, a "
            "disconnect or an error). Candidates of a request that was refused before it started are not counted. "
            "Count.",
            "outcome",
        )
        self._ends = {outcome: candidates.labels(outcome) for outcome in ("completed", "failed", "cancelled")}
        self._in_flight = self._gauge(
            "nbest_candidates_in_flight",
            "Candidates of running requests that have not ended, including those that a stopping policy may still "
            "sample. Count.",
        )
        self._running = self._gauge(
            "nbest_admitted_candidates", "Candidates of admitted requests, which are generating or scoring. Count."
        )
        self._queued = self._gauge("nbest_queued_candidates", "Candidates of requests that wait for admission. Count.")
        self._queued_tokens = self._gauge(
            "nbest_queued_tokens",
            "Upper estimate of the tokens of requests that wait for admission: prompt + candidates * max_tokens. "
            "Tokens.",
        )
        self._shed = self._counter(
            "nbest_shed",
            "Requests refused with 429, by reason: queue, connections, requests_budget, tokens_budget, or generator if "
            "an upstream server refused. Count.",
            "reason",
        )
        self._ready = Gauge(
            READY,
            "Whether a request would be answered, 1 or 0, at the time of the scrape. Count.",
            registry=self.registry,
        )
        self._answers = self._counter(
            "nbest_answers",
            "Completions answered, by what ranked the candidates and what ended the wait for them. Count.",
            "ranked_by",
            "stopped_by",
        )
        self._spared = self._counter(
            "nbest_spared_candidates",
            "Candidates of answered requests that a stopping policy did not complete: cancelled while they were "
            "generated, or not_drawn. Count.",
            "policy",
            "spared",
        )
        self._reward_failures = self._counter(
            "nbest_reward_failures",
            "Requests whose reward model returned no reward at all, by how they ended: with an error, or with an "
            "answer ranked by logprob or in the order of sampling (first). Requests that a deadline left without a "
            "reward are not counted. Count.",
            "ended_as",
        )
        for ended_as in ("error", "logprob", "first"):
            self._reward_failures.labels(ended_as)  # starts at 0, so that the first failure is an increase
        self._prompt_tokens = self._counter(
            "nbest_prompt_tokens", "Prompt tokens of answered requests, counted once for each request. Tokens."
        )
        self._generated_tokens = self._counter(
            "nbest_generated_tokens", "Tokens of completed candidates, winners and losers. Tokens."
        )
        self._scored_tokens = self._counter(
            "nbest_scored_tokens",
            "Tokens that the scorers read for answered requests, of prompts and candidates; a shared prompt counts "
            "once. Tokens.",
        )
        self._engine_restarts = self._counter(
            "nbest_engine_restarts", "Engines that were started to replace an engine that died. Count."
        )
        self._engine_recovery_s = self._histogram(
            "nbest_engine_recovery_seconds",
            "From the detected death of an engine until its replacement is ready. Seconds.",
            SECONDS,
        )
        self._queue_s = self._histogram(
            "nbest_queue_seconds",
            "Of each answered request: the wait for admission and for the first candidate to start. Seconds.",
            SECONDS,
        )
        self._generate_s = self._histogram(
            "nbest_generate_seconds",
            "Of each answered request: from the start of the first candidate to the end of the last. Seconds.",
            SECONDS,
        )
        self._score_s = self._histogram(
            "nbest_score_seconds",
            "Of each answered request: time in which at least one scorer call was running; overlaps with generating. "
            "Seconds.",
            SECONDS,
        )
        self._select_s = self._histogram(
            "nbest_select_seconds", "Of each answered request: the selection alone. Seconds.", SECONDS
        )
        self._request_s = self._histogram(
            "nbest_request_seconds",
            "Of each answered request: from the wait for admission to the end of the selection. Seconds.",
            SECONDS,
        )
        self._candidate_s = self._histogram(
            "nbest_request_candidate_seconds",
            "Cost of each answered request for the engine: the sum of the seconds that its candidates ran. Seconds.",
            SECONDS,
        )
        self._request_tokens = self._histogram(
            "nbest_request_tokens",
            "Cost of each answered request in tokens, by kind: prompt, generated by all completed candidates, scored. "
            "Tokens.",
            REQUEST_TOKENS,
            "kind",
        )
        self._batch_sequences = self._histogram(
            "nbest_score_batch_sequences", "Sequences in one scoring batch. Count.", BATCH_SEQUENCES
        )
        self._batch_tokens = self._histogram(
            "nbest_score_batch_tokens", "Tokens in one scoring batch, including padding. Tokens.", BATCH_TOKENS
        )
        lookups = self._counter(
            "nbest_score_cache_lookups",
            "Candidates looked up in the score cache, by whether the cache had their reward: hit or miss. Count.",
            "found",
        )
        self._lookups = {outcome: lookups.labels(outcome) for outcome in ("hit", "miss")}
        self._winner_reward = self._histogram(
            "nbest_winner_reward",
            "Reward of the winner of each answered request; has no sum, since rewards may be negative. Units of the "
            "reward model.",
            REWARDS,
            "reward_model",
        )
        self._reward_gain = self._histogram(
            "nbest_reward_gain",
            "Reward of the winner - mean reward of the candidates of its request: the gain of best-of-N over a single "
            "sample. Units of the reward model.",
            REWARD_GAINS,
            "reward_model",
        )

    def run(self) -> "RunMetrics":
        """The observer of one run of the pipeline."""
        return RunMetrics(self, self._in_flight, self._ends, self._generated_tokens)

    def observe_ready(self, ready: bool) -> None:
        self._ready.set(ready)

    def observe_reward_failure(self, ended_as: str) -> None:
        """Counts a request without any reward; `ended_as` is `error`, or what ranked the answer: `logprob`, `first`."""
        self._reward_failures.labels(ended_as).inc()

    def observe_answer(self, result: BestOfNResult) -> None:
        """Records the durations, tokens and rewards of an answered request."""
        self._queue_s.observe(result.timings.queue)
        self._generate_s.observe(result.timings.generate)
        self._score_s.observe(result.timings.score)
        self._select_s.observe(result.timings.select)
        self._request_s.observe(result.timings.total)
        self._candidate_s.observe(result.candidate_s)
        tokens = {
            "prompt": result.prompt_tokens,
            "generated": result.generated_tokens,
            "scored": result.scored_tokens,
        }
        for kind, num_tokens in tokens.items():
            self._request_tokens.labels(kind).observe(num_tokens)
        self._prompt_tokens.inc(result.prompt_tokens)
        self.observe_scored_tokens(result.scored_tokens)
        self._answers.labels(result.ranked_by, result.stopped_by).inc()
        if result.stopped_by not in ("all", "deadline"):
            self._spared.labels(result.stopped_by, "cancelled").inc(result.cancelled)
            self._spared.labels(result.stopped_by, "not_drawn").inc(result.not_drawn)
        winner = result.selection.winner
        rewards = [scored.reward for scored in result.selection.ranking if math.isfinite(scored.reward)]
        if result.reward_model is not None and not rewards and result.stopped_by != "deadline":
            self.observe_reward_failure(result.ranked_by)
        if math.isfinite(winner.reward):
            self._winner_reward.labels(result.reward_model).observe(winner.reward)
            self._reward_gain.labels(result.reward_model).observe(winner.reward - sum(rewards) / len(rewards))

    def observe_scored_tokens(self, num_tokens: int) -> None:
        self._scored_tokens.inc(num_tokens)

    def observe_batch(self, num_sequences: int, num_tokens: int) -> None:
        """Records a scoring batch; `num_tokens` includes the padding."""
        self._batch_sequences.observe(num_sequences)
        self._batch_tokens.observe(num_tokens)

    def observe_lookup(self, hits: int, misses: int) -> None:
        """Counts the candidates of one scorer call that were in the score cache, and those that were not."""
        self._lookups["hit"].inc(hits)
        self._lookups["miss"].inc(misses)

    def observe_restart(self, recovery_s: float) -> None:
        """Records that a new engine is ready, `recovery_s` seconds after the last one died."""
        self._engine_restarts.inc()
        self._engine_recovery_s.observe(recovery_s)

    def observe_admission(self, running_candidates: int, queued_candidates: int, queued_tokens: int) -> None:
        """Sets the gauges of the admission queue."""
        self._running.set(running_candidates)
        self._queued.set(queued_candidates)
        self._queued_tokens.set(queued_tokens)

    def observe_shed(self, reason: ShedReason) -> None:
        """Counts a request that was refused with 429."""
        self._shed.labels(reason).inc()

    def observe_request(self, endpoint: str, status: int) -> None:
        """Counts an HTTP request that ended; `endpoint` is a route, never a raw path: clients must not add series."""
        self._requests.labels(endpoint, str(status)).inc()

    def render(self) -> bytes:
        """The text of `GET /metrics`, of type `content_type`."""
        return generate_latest(self.registry)

    def _counter(self, name: str, documentation: str, *labels: str) -> Counter:
        return Counter(name, documentation, labels, registry=self.registry)

    def _gauge(self, name: str, documentation: str) -> Gauge:
        return Gauge(name, documentation, registry=self.registry)

    def _histogram(self, name: str, documentation: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(name, documentation, labels, buckets=buckets, registry=self.registry)


def merge_expositions(expositions: Mapping[str, bytes]) -> bytes:
    """Merges the texts of `/metrics` of several processes; the label `replica` names the process of each series.

    `nbest_ready` is taken from the first process only, which has updated it for this scrape. In the other processes it
    is the value of an earlier scrape, or was never set.
    """
    families: dict[str, Metric] = {}
    for number, (replica, exposition) in enumerate(expositions.items()):
        for family in text_string_to_metric_families(exposition.decode()):
            if family.name == READY and number:
                continue
            merged_family = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                merged_family.add_sample(sample.name, {**sample.labels, "replica": replica}, sample.value)
    return generate_latest(_FamilyRegistry(list(families.values())))


class _FamilyRegistry(CollectorRegistry):
    """A registry of metric families that other processes have collected."""

    def __init__(self, families: list[Metric]) -> None:
        super().__init__()
        self._families = families

    def collect(self) -> Iterator[Metric]:
        yield from self._families


class RunMetrics(RunObserver):
    """Counts the candidates of one run as they end, and records its durations, tokens and rewards once it has a result.

    `ends` are the counters of ended candidates, by outcome.
    """

    def __init__(
        self, metrics: Metrics, in_flight: Gauge, ends: Mapping[str, Counter], generated_tokens: Counter
    ) -> None:
        self._metrics = metrics
        self._in_flight = in_flight
        self._ends = ends
        self._generated_tokens = generated_tokens
        self._remaining = 0
        self._begun_tokens = 0

    def started(self, request: BestOfNRequest) -> None:
        self._count_cancelled()  # the candidates of the previous block that have not ended
        self._begun_tokens = request.sampling.begun_tokens
        self._remaining = request.best_of
        self._in_flight.inc(request.best_of)

    def outcome(self, outcome: Outcome) -> None:
        if isinstance(outcome, FailedCandidate):
            self._count_ended("failed", 1)
        elif outcome.finish_reason is not None:
            self._count_ended("completed", 1)
            self._generated_tokens.inc(outcome.num_tokens - self._begun_tokens)

    def finished(self, result: BestOfNResult) -> None:
        self._remaining -= result.not_drawn
        self._in_flight.dec(result.not_drawn)
        self._metrics.observe_answer(result)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._count_cancelled()
        if isinstance(error, RewardError):
            self._metrics.observe_reward_failure("error")

    def _count_cancelled(self) -> None:
        self._count_ended("cancelled", self._remaining)

    def _count_ended(self, outcome: str, count: int) -> None:
        self._ends[outcome].inc(count)
        self._in_flight.dec(count)
        self._remaining -= count
