"""Each metric after a few scripted requests, with expected numbers computed by hand."""

import math
from dataclasses import replace

import pytest

from reranker.candidate import Candidate, FailedCandidate, Prompt, ScoredCandidate, Selection
from server.errors import BadRequestError
from server.generation.base import SamplingParams
from server.observability.metrics import Metrics, merge_expositions
from server.pipeline.types import BestOfNRequest, BestOfNResult, Timings


def candidate(index: int, num_tokens: int = 1, *, finished: bool = True) -> Candidate:
    return Candidate(index, "word", num_tokens, finish_reason="stop" if finished else None)


def result(*rewards: float) -> BestOfNResult:
    """An answer whose candidates, best first, have these rewards."""
    ranking = tuple(ScoredCandidate(candidate(index), reward) for index, reward in enumerate(rewards))
    return BestOfNResult(
        selection=Selection(ranking),
        best_of=len(rewards),
        completed=len(rewards),
        failed=0,
        cancelled=0,
        not_drawn=0,
        strategy="argmax",
        reward_model="taste",
        ranked_by="reward",
        stopped_by="all",
        prompt_tokens=3,
        generated_tokens=len(rewards),
        scored_tokens=11,
        prompt_tokens_cut=0,
        candidate_s=6.0,
        timings=Timings(queue=0.5, generate=2.0, score=0.75, select=0.25, total=4.0),
    )


def request(best_of: int) -> BestOfNRequest:
    return BestOfNRequest(Prompt(text="How was it?"), SamplingParams(), best_of)


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


def value(metrics: Metrics, sample: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(sample, labels)


def test_candidates_are_counted_as_they_end(metrics: Metrics) -> None:
    with metrics.run() as run:
        run.started(request(4))
        assert value(metrics, "nbest_candidates_in_flight") == 4
        run.outcome(candidate(0, num_tokens=5, finished=False))  # still growing
        assert value(metrics, "nbest_candidates_in_flight") == 4
        run.outcome(candidate(0, num_tokens=6))
        run.outcome(candidate(1, num_tokens=2))
        run.outcome(FailedCandidate(2, "scripted"))
        assert value(metrics, "nbest_candidates_in_flight") == 1
    assert value(metrics, "nbest_candidates_in_flight") == 0
    assert value(metrics, "nbest_candidates_total", outcome="completed") == 2
    assert value(metrics, "nbest_candidates_total", outcome="failed") == 1
    assert value(metrics, "nbest_candidates_total", outcome="cancelled") == 1
    assert value(metrics, "nbest_generated_tokens_total") == 8


def test_candidates_that_were_not_drawn_are_not_counted_as_ended(metrics: Metrics) -> None:
    with metrics.run() as run:
        run.started(request(4))
        run.outcome(candidate(0))
        run.finished(replace(result(1.0), best_of=4, cancelled=1, not_drawn=2))
        assert value(metrics, "nbest_candidates_in_flight") == 1
    assert value(metrics, "nbest_candidates_in_flight") == 0
    assert value(metrics, "nbest_candidates_total", outcome="cancelled") == 1


def test_candidates_spared_by_a_stopping_policy_are_counted_under_its_name(metrics: Metrics) -> None:
    stopped = replace(result(1.0), stopped_by="adaptive_rejection", cancelled=3, not_drawn=4)
    metrics.observe_answer(stopped)
    metrics.observe_answer(replace(stopped, stopped_by="deadline"))
    spared = {
        outcome: value(metrics, "nbest_spared_candidates_total", policy="adaptive_rejection", spared=outcome)
        for outcome in ("cancelled", "not_drawn")
    }
    assert spared == {"cancelled": 3, "not_drawn": 4}
    assert value(metrics, "nbest_spared_candidates_total", policy="deadline", spared="cancelled") is None


def test_unfinished_candidates_of_a_client_that_disconnects_count_as_cancelled(metrics: Metrics) -> None:
    def disconnect_after_first_candidate() -> None:
        with metrics.run() as run:
            run.started(request(3))
            run.outcome(candidate(0))
            raise ConnectionError

    with pytest.raises(ConnectionError):
        disconnect_after_first_candidate()
    assert value(metrics, "nbest_candidates_total", outcome="cancelled") == 2
    assert value(metrics, "nbest_candidates_in_flight") == 0


def test_a_refused_request_counts_no_candidates(metrics: Metrics) -> None:
    with pytest.raises(BadRequestError), metrics.run():
        raise BadRequestError("the prompt is too long")
    assert value(metrics, "nbest_candidates_total", outcome="cancelled") == 0
    assert value(metrics, "nbest_candidates_in_flight") == 0


def test_an_answer_adds_its_durations_and_scored_tokens(metrics: Metrics) -> None:
    metrics.observe_answer(result(1.0))
    metrics.observe_answer(result(1.0))
    for stage, seconds in {"queue": 0.5, "generate": 2.0, "score": 0.75, "select": 0.25, "request": 4.0}.items():
        assert value(metrics, f"nbest_{stage}_seconds_count") == 2
        assert value(metrics, f"nbest_{stage}_seconds_sum") == 2 * seconds
    assert value(metrics, "nbest_scored_tokens_total") == 22


def test_an_answer_adds_its_cost_in_seconds_and_tokens(metrics: Metrics) -> None:
    metrics.observe_answer(result(1.0, 0.0))
    assert value(metrics, "nbest_request_candidate_seconds_sum") == 6
    costs = {"prompt": 3, "generated": 2, "scored": 11}
    for kind, tokens in costs.items():
        assert value(metrics, "nbest_request_tokens_sum", kind=kind) == tokens
    assert value(metrics, "nbest_prompt_tokens_total") == 3
    assert value(metrics, "nbest_answers_total", ranked_by="reward", stopped_by="all") == 1


def test_an_answer_that_a_deadline_left_without_rewards_is_not_a_reward_failure(metrics: Metrics) -> None:
    metrics.observe_answer(replace(result(math.nan), stopped_by="deadline", ranked_by="first"))
    assert value(metrics, "nbest_reward_failures_total", ended_as="first") == 0


def test_reward_gain_is_the_winner_minus_the_mean(metrics: Metrics) -> None:
    metrics.observe_answer(result(4.0, 1.0, -2.0))  # mean 1, gain 3
    assert value(metrics, "nbest_winner_reward_count", reward_model="taste") == 1
    assert value(metrics, "nbest_winner_reward_bucket", reward_model="taste", le="3.0") == 0
    assert value(metrics, "nbest_winner_reward_bucket", reward_model="taste", le="5.0") == 1
    assert value(metrics, "nbest_reward_gain_sum", reward_model="taste") == 3


def test_missing_rewards_are_left_out_of_the_mean(metrics: Metrics) -> None:
    metrics.observe_answer(result(2.0, 1.0, math.nan))  # mean of 2 and 1 is 1.5
    assert value(metrics, "nbest_reward_gain_sum", reward_model="taste") == 0.5


def test_an_answer_without_any_reward_adds_no_reward(metrics: Metrics) -> None:
    metrics.observe_answer(result(math.nan, math.nan))
    assert value(metrics, "nbest_winner_reward_count", reward_model="taste") is None


def test_scoring_batches_add_their_sequences_and_tokens(metrics: Metrics) -> None:
    metrics.observe_batch(4, 400)
    metrics.observe_batch(2, 100)
    assert value(metrics, "nbest_score_batch_sequences_sum") == 6
    assert value(metrics, "nbest_score_batch_tokens_sum") == 500
    assert value(metrics, "nbest_score_batch_tokens_bucket", le="128.0") == 1


def test_score_cache_lookups_are_counted_as_hit_or_miss(metrics: Metrics) -> None:
    metrics.observe_lookup(3, 1)
    metrics.observe_lookup(0, 4)
    counts = {
        outcome: metrics.registry.get_sample_value("nbest_score_cache_lookups_total", {"found": outcome})
        for outcome in ("hit", "miss")
    }
    assert counts == {"hit": 3, "miss": 5}


def test_requests_are_counted_by_endpoint_and_status(metrics: Metrics) -> None:
    for status in (200, 200, 400):
        metrics.observe_request("/v1/score", status)
    assert value(metrics, "nbest_requests_total", endpoint="/v1/score", status="200") == 2
    assert value(metrics, "nbest_requests_total", endpoint="/v1/score", status="400") == 1


def test_every_metric_name_starts_with_nbest_and_its_help_ends_with_its_unit(metrics: Metrics) -> None:
    units = ("Seconds.", "Tokens.", "Count.", "Units of the reward model.")
    for family in metrics.registry.collect():
        assert family.name.startswith("nbest_")
        assert family.documentation.endswith(units), family.name


def test_two_servers_in_one_process_do_not_share_metrics(metrics: Metrics) -> None:
    other = Metrics()
    other.observe_request("/v1/score", 200)
    assert value(metrics, "nbest_requests_total", endpoint="/v1/score", status="200") is None


def test_render_returns_the_text_exposition(metrics: Metrics) -> None:
    metrics.observe_batch(4, 400)
    assert b"nbest_score_batch_tokens_sum 400.0" in metrics.render()
    assert metrics.content_type.startswith("text/plain")


def test_merged_expositions_have_a_replica_label_and_the_ready_gauge_of_the_first_only(metrics: Metrics) -> None:
    other = Metrics()
    metrics.observe_ready(True)
    metrics.observe_batch(2, 40)
    other.observe_batch(3, 50)
    expositions = {"router-1": metrics.render(), "scorer-1": other.render()}
    lines = merge_expositions(expositions).decode().splitlines()
    assert [line for line in lines if line.startswith("nbest_ready{")] == ['nbest_ready{replica="router-1"} 1.0']
    assert 'nbest_score_batch_sequences_sum{replica="router-1"} 2.0' in lines
    assert 'nbest_score_batch_sequences_sum{replica="scorer-1"} 3.0' in lines
