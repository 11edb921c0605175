"""The metrics of the server, for Prometheus: every collector, its formula and unit in its help text.

Stages pass on durations, never timestamps, so the figures stay true when the stages run in different processes.
Candidates are counted when they end, not when their request does: `RunMetrics` observes one run, so that the same few
lines count a client that hangs up, a deadline and an answer.
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
"""Reward models are trained to about unit spread, and some answer in tens."""
REWARD_GAINS = (0, 0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10)
REQUEST_TOKENS = (16, 64, 256, 1024, 4096, 16384, 65536)
BATCH_SEQUENCES = (1, 2, 4, 8, 16, 32, 64, 128)
BATCH_TOKENS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


class Metrics:
    """The collectors of one server, in a registry of their own."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = self._counter(
            "nbest_requests",
            "HTTP requests answered, by route and status; 499 where the client hung up before the status line. Count.",
            "endpoint",
            "status",
        )
        candidates = self._counter(
            "nbest_candidates",
            "Candidates that ended: completed, failed in the engine, or cancelled (deadline, stopping policy, hang-up, "
            "error). "
            "Those of a request that was refused before it started are not counted. Count.",
            "outcome",
        )
        self._ends = {outcome: candidates.labels(outcome) for outcome in ("completed", "failed", "cancelled")}
        self._in_flight = self._gauge(
            "nbest_candidates_in_flight",
            "Candidates of running requests that have not ended, counting those a stopping policy may yet draw. Count.",
        )
        self._running = self._gauge(
            "nbest_admitted_candidates", "Candidates of admitted requests, generating or scoring. Count."
        )
        self._queued = self._gauge("nbest_queued_candidates", "Candidates of requests that wait their turn. Count.")
        self._queued_tokens = self._gauge(
            "nbest_queued_tokens",
            "Most tokens that waiting requests may cost: prompt + candidates * max_tokens, estimated. Tokens.",
        )
        self._shed = self._counter(
            "nbest_shed",
            "Requests refused with 429, by reason: queue, connections, requests_budget, tokens_budget, or generator "
            "where an upstream server refused. Count.",
            "reason",
        )
        self._ready = Gauge(
            READY,
            "Whether a request would be answered, 1 or 0, as of this scrape. Count.",
            registry=self.registry,
        )
        self._answers = self._counter(
            "nbest_answers",
            "Completions answered, by what ordered the candidates and what ended the wait for them. Count.",
            "ranked_by",
            "stopped_by",
        )
        self._spared = self._counter(
            "nbest_spared_candidates",
            "Candidates of answered requests that their stopping policy spared the engine: cancelled while they were "
            "written, or not_drawn. Count.",
            "policy",
            "spared",
        )
        self._reward_failures = self._counter(
            "nbest_reward_failures",
            "Requests whose reward model gave no reward at all, by what became of them: an error, or an answer ordered "
            "by logprob or as drawn (first). A deadline that left no time for rewards is none. Count.",
            "ended_as",
        )
        for ended_as in ("error", "logprob", "first"):
            self._reward_failures.labels(ended_as)  # from 0 on, so that the first one is a rise
        self._prompt_tokens = self._counter(
            "nbest_prompt_tokens", "Tokens of the prompts, once a request, of requests that were answered. Tokens."
        )
        self._generated_tokens = self._counter(
            "nbest_generated_tokens", "Tokens of completed candidates, winners and losers alike. Tokens."
        )
        self._scored_tokens = self._counter(
            "nbest_scored_tokens",
            "Tokens the scorers read, prompt and candidate, a shared prompt once; of requests that were answered. "
            "Tokens.",
        )
        self._engine_restarts = self._counter(
            "nbest_engine_restarts", "Engines that were started in place of one that had died. Count."
        )
        self._engine_recovery_s = self._histogram(
            "nbest_engine_recovery_seconds",
            "Death of an engine, as noticed, to the next one being ready. Seconds.",
            SECONDS,
        )
        self._queue_s = self._histogram(
            "nbest_queue_seconds",
            "Waiting for admission and until the first candidate is under way, a request. Seconds.",
            SECONDS,
        )
        self._generate_s = self._histogram(
            "nbest_generate_seconds", "First candidate under way to the last one ended, a request. Seconds.", SECONDS
        )
        self._score_s = self._histogram(
            "nbest_score_seconds",
            "Time in which at least one scorer call was out, a request; overlaps with generating. Seconds.",
            SECONDS,
        )
        self._select_s = self._histogram("nbest_select_seconds", "The selection alone, a request. Seconds.", SECONDS)
        self._request_s = self._histogram(
            "nbest_request_seconds", "Waiting for admission to the selection, an answered request. Seconds.", SECONDS
        )
        self._candidate_s = self._histogram(
            "nbest_request_candidate_seconds",
            "What an answered request cost the engine: seconds that its candidates were under way, added up. Seconds.",
            SECONDS,
        )
        self._request_tokens = self._histogram(
            "nbest_request_tokens",
            "What an answered request cost in tokens: of its prompt, generated by all completed candidates, scored. "
            "Tokens.",
            REQUEST_TOKENS,
            "kind",
        )
        self._batch_sequences = self._histogram(
            "nbest_score_batch_sequences", "Sequences computed together in one scoring batch. Count.", BATCH_SEQUENCES
        )
        self._batch_tokens = self._histogram(
            "nbest_score_batch_tokens", "Tokens of one scoring batch, padding included. Tokens.", BATCH_TOKENS
        )
        lookups = self._counter(
            "nbest_score_cache_lookups",
            "Candidates looked up in the score cache, by whether their reward was held: hit, or miss. Count.",
            "found",
        )
        self._lookups = {found: lookups.labels(found) for found in ("hit", "miss")}
        self._winner_reward = self._histogram(
            "nbest_winner_reward",
            "Reward of the winner, an answered request; no sum, as rewards may be negative. Units of the reward model.",
            REWARDS,
            "reward_model",
        )
        self._reward_gain = self._histogram(
            "nbest_reward_gain",
            "Reward of the winner - mean reward of its request's candidates: what best-of-N adds to a single sample. "
            "Units of the reward model.",
            REWARD_GAINS,
            "reward_model",
        )

    def run(self) -> "RunMetrics":
        """The observer that counts one run of the pipeline."""
        return RunMetrics(self, self._in_flight, self._ends, self._generated_tokens)

    def observe_ready(self, ready: bool) -> None:
        self._ready.set(ready)

    def observe_reward_failure(self, ended_as: str) -> None:
        """A request got no reward at all: it ended as an `error`, or ranked by `logprob` or `first`."""
        self._reward_failures.labels(ended_as).inc()

    def observe_answer(self, result: BestOfNResult) -> None:
        """Takes the durations, tokens and rewards of a request that was answered."""
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
        rewards = [one.reward for one in result.selection.ranking if math.isfinite(one.reward)]
        if result.reward_model is not None and not rewards and result.stopped_by != "deadline":
            self.observe_reward_failure(result.ranked_by)
        if math.isfinite(winner.reward):
            self._winner_reward.labels(result.reward_model).observe(winner.reward)
            self._reward_gain.labels(result.reward_model).observe(winner.reward - sum(rewards) / len(rewards))

    def observe_scored_tokens(self, num_tokens: int) -> None:
        self._scored_tokens.inc(num_tokens)

    def observe_batch(self, num_sequences: int, num_tokens: int) -> None:
        """One scoring batch was computed; `num_tokens` includes the padding."""
        self._batch_sequences.observe(num_sequences)
        self._batch_tokens.observe(num_tokens)

    def observe_lookup(self, hits: int, misses: int) -> None:
        """So many candidates of one call were in the score cache, and so many were not."""
        self._lookups["hit"].inc(hits)
        self._lookups["miss"].inc(misses)

    def observe_restart(self, recovery_s: float) -> None:
        """An engine is ready again, `recovery_s` after the last one died."""
        self._engine_restarts.inc()
        self._engine_recovery_s.observe(recovery_s)

    def observe_admission(self, running_candidates: int, queued_candidates: int, queued_tokens: int) -> None:
        """The line for admission has moved."""
        self._running.set(running_candidates)
        self._queued.set(queued_candidates)
        self._queued_tokens.set(queued_tokens)

    def observe_shed(self, reason: ShedReason) -> None:
        """One request was refused with 429."""
        self._shed.labels(reason).inc()

    def observe_request(self, endpoint: str, status: int) -> None:
        """One HTTP request ended; `endpoint` is a route, never a raw path, so that clients cannot add series."""
        self._requests.labels(endpoint, str(status)).inc()

    def render(self) -> bytes:
        """The exposition that `GET /metrics` serves, of type `content_type`."""
        return generate_latest(self.registry)

    def _counter(self, name: str, documentation: str, *labels: str) -> Counter:
        return Counter(name, documentation, labels, registry=self.registry)

    def _gauge(self, name: str, documentation: str) -> Gauge:
        return Gauge(name, documentation, registry=self.registry)

    def _histogram(self, name: str, documentation: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(name, documentation, labels, buckets=buckets, registry=self.registry)


def merged(expositions: Mapping[str, bytes]) -> bytes:
    """The expositions of several processes as one; the label `replica` tells where each series was counted.

    Whether a request would be answered is looked up for the scrape by the first of them alone: what the others have is
    of an earlier one, or of none.
    """
    families: dict[str, Metric] = {}
    for number, (replica, exposition) in enumerate(expositions.items()):
        for family in text_string_to_metric_families(exposition.decode()):
            if family.name == READY and number:
                continue
            same = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                same.add_sample(sample.name, {**sample.labels, "replica": replica}, sample.value)
    return generate_latest(_Collected(list(families.values())))


class _Collected(CollectorRegistry):
    """Families that were collected elsewhere."""

    def __init__(self, families: list[Metric]) -> None:
        super().__init__()
        self._families = families

    def collect(self) -> Iterator[Metric]:
        yield from self._families


class RunMetrics(RunObserver):
    """Counts one run: its candidates as they end, and its durations, tokens and rewards once it has a result."""

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
        self._cancelled()  # what is left of the block before
        self._begun_tokens = request.sampling.begun_tokens
        self._remaining = request.best_of
        self._in_flight.inc(request.best_of)

    def outcome(self, outcome: Outcome) -> None:
        if isinstance(outcome, FailedCandidate):
            self._ended("failed", 1)
        elif outcome.finish_reason is not None:
            self._ended("completed", 1)
            self._generated_tokens.inc(outcome.num_tokens - self._begun_tokens)

    def finished(self, result: BestOfNResult) -> None:
        self._remaining -= result.not_drawn
        self._in_flight.dec(result.not_drawn)
        self._metrics.observe_answer(result)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cancelled()
        if isinstance(error, RewardError):
            self._metrics.observe_reward_failure("error")

    def _cancelled(self) -> None:
        self._ended("cancelled", self._remaining)

    def _ended(self, outcome: str, count: int) -> None:
        self._ends[outcome].inc(count)
        self._in_flight.dec(count)
        self._remaining -= count
