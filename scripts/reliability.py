"""The table of docs/reliability.md: every promise with the tests that inject its fault and the measured figures.

The figures come from benchmarks/results; a promise without a result says so. Tests are named by their pytest ids,
relative to tests/.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from reranker.markdown import table

Results = Callable[[str], Any]
"""Name of a result -> its contents, or None where it does not exist."""
NOT_YET = "not measured yet"


@dataclass(frozen=True, slots=True)
class Promise:
    """A row of the table."""

    text: str
    tests: tuple[str, ...]
    measured: Callable[[Results], str | None]


def promises(results: Results) -> str:
    """The table of docs/reliability.md."""
    rows = (
        (promise.text, "<br>".join(f"`{test}`" for test in promise.tests), promise.measured(results) or NOT_YET)
        for promise in PROMISES
    )
    return table(("promise", "tests", "measured"), rows)


def _by_tests_alone(_: Results) -> str:
    return "exact, by the tests"


def _engine_killed(results: Results) -> str | None:
    killed = (results("reliability") or {}).get("killed")
    if killed is None:
        return None
    recovery_s = killed["recovery_s"]
    return (
        f"{killed['rounds']} kills with {killed['in_flight']} requests in flight each: {killed['lost']} lost, "
        f"{killed['statuses'].get('200', 0)} answered, {killed['statuses'].get('503', 0)} got 503; ready again "
        f"after {recovery_s['median']:.0f} s ({recovery_s['low']:.0f} … {recovery_s['high']:.0f})"
    )


def _lost_on_ray(fault: str) -> Callable[[Results], str | None]:
    def measured(results: Results) -> str | None:
        figures = (results("reliability_ray") or {"faults": {}})["faults"].get(fault)
        if figures is None:
            return None
        return (
            f"with {figures['in_flight']} requests in flight: {figures['lost']} lost, "
            f"{figures['statuses'].get('200', 0)} answered, {figures['statuses'].get('503', 0)} got 503; ready again "
            f"after {figures['recovery_s']:.0f} s"
        )

    return measured


def _cancelled(results: Results) -> str | None:
    cancelled = (results("reliability") or {}).get("cancelled")
    if cancelled is None:
        return None
    idle_s = cancelled["engine_idle_after_s"]
    return (
        f"{cancelled['requests']} requests, {cancelled['cancelled_in_the_engine']} candidates cancelled; engine idle "
        f"after {idle_s['median']:.2f} s (at most {idle_s['high']:.2f}); left: {cancelled['unfinished_in_the_engine']} "
        f"in the engine, {cancelled['in_flight_after']:.0f} in flight; memory {cancelled['memory']['growth']:+.1%}"
    )


def _stopped(results: Results) -> str | None:
    stopped = (results("reliability") or {}).get("stopped")
    if stopped is None:
        return None
    return (
        f"{stopped['statuses'].get('200', 0)} of {stopped['in_flight']} requests in flight answered, new requests get "
        f"{stopped['new_requests_get']}; exit code {stopped['exit_code']} after {stopped['seconds']:.0f} s, "
        f"{stopped['processes_left']} processes left"
    )


def _soak(results: Results) -> str | None:
    soak = results("soak")
    if soak is None:
        return None
    requests, kills = sum(soak["requests"].values()), sum(soak["kills"].values())
    return (
        f"{soak['minutes']:g} minutes, {requests} requests, {kills} kills: "
        f"{soak['wrong']} wrong, {soak['hung']} hung, {soak['lost']} lost; memory "
        f"{soak['server_memory']['growth']:+.1%} after warm-up"
    )


def _overloaded(results: Results) -> str | None:
    overload = results("overload")
    if overload is None:
        return None
    at_capacity, over = (overload["loads"][multiple] for multiple in ("1x", "10x"))
    return (
        f"p95 of admitted requests {over['p95_s']:.1f} s at 10 times capacity, {at_capacity['p95_s']:.1f} s at "
        f"capacity: {overload['p95_ratio_last_to_first']:.2f} times; {over['status_429']} got 429, "
        f"{sum(over['failed'].values())} failed; the server's memory {over['server_peak_rss_mib']:.0f} MiB at most "
        "(scripted engine)"
    )


PROMISES = (
    Promise(
        "One surviving candidate is enough for an answer, and the reply says how many failed.",
        (
            "server/pipeline/test_best_of_n.py::test_one_failed_candidate_does_not_fail_the_request",
            "server/pipeline/test_best_of_n.py::test_if_all_candidates_fail_the_error_has_the_reason",
            "server/test_app.py::test_a_failed_candidate_is_counted_and_is_not_part_of_the_kl_bound",
        ),
        _by_tests_alone,
    ),
    Promise(
        "`deadline_s` returns the best candidate so far, labelled; 504 only if no candidate is complete.",
        (
            "server/pipeline/test_best_of_n.py::TestDeadline::test_the_best_finished_candidate_wins_and_the_rest_is_cancelled",
            "server/test_app.py::test_candidates_cancelled_by_a_deadline_are_part_of_the_kl_bound",
            "server/test_app.py::test_a_deadline_before_any_candidate_finished_is_504",
            "server/generation/test_supervisor.py::test_a_deadline_ends_the_wait_for_the_next_engine",
        ),
        _by_tests_alone,
    ),
    Promise(
        "A reward failure is handled as `on_reward_failure` says: never silent, never a 200 with error text.",
        (
            "server/pipeline/test_best_of_n.py::TestRewardFailure::test_ranked_by_names_the_fallback",
            "server/test_app.py::test_a_reward_failure_without_a_fallback_is_503_without_an_answer",
            "server/test_app_streaming.py::test_an_error_after_the_first_event_is_the_last_event",
        ),
        _by_tests_alone,
    ),
    Promise(
        "A killed engine loses no request: requests in flight are sampled again once or get a 503; `/ready` is 503 "
        "until the next engine is ready, `/health` stays up. The same holds for the process of a `python:` scorer.",
        (
            "end_to_end/test_reliability.py::test_an_engine_killed_during_twenty_requests_is_replaced_and_loses_none",
            "server/generation/test_supervisor.py::test_twenty_running_requests_are_answered_by_the_next_engine",
            "server/generation/test_supervisor.py::test_requests_do_not_wait_while_engines_die_one_after_another",
            "reranker/scorers/test_verifier.py::test_a_process_that_exits_between_calls_is_started_again",
        ),
        _engine_killed,
    ),
    Promise(
        "Overload: requests beyond the queue are rejected with 429 and a `Retry-After` that OpenAI's client honours; "
        "an admitted request waits no longer than the queue takes to drain.",
        (
            "server/http/test_admission.py::test_the_official_client_waits_for_retry_after_and_is_then_served",
            "server/http/test_admission.py::test_at_ten_times_capacity_admitted_requests_wait_no_longer_than_the_queue_takes_to_drain",
            "server/http/test_admission.py::test_a_request_over_capacity_is_429_with_a_retry_after",
        ),
        _overloaded,
    ),
    Promise(
        "On Ray: a killed engine is replaced, and its requests are sampled again once.",
        ("server/distributed/test_ray_faults.py::test_the_engines_of_all_replicas_die",),
        _lost_on_ray("engine"),
    ),
    Promise(
        "On Ray: a killed generator replica is replaced, and its requests are sampled again once; its engine ends "
        "with it.",
        (
            "server/distributed/test_ray_faults.py::test_one_of_two_generator_replicas_is_killed",
            "server/distributed/test_ray_faults.py::test_all_generator_replicas_are_killed",
            "end_to_end/test_on_ray.py::test_a_generator_killed_during_twenty_requests_is_replaced_and_loses_none",
        ),
        _lost_on_ray("generator"),
    ),
    Promise(
        "On Ray: a killed scorer replica is replaced, and its candidates are scored again once.",
        (
            "server/distributed/test_ray_faults.py::test_one_of_two_scorer_replicas_is_killed",
            "server/distributed/test_ray_faults.py::test_all_scorer_replicas_are_killed",
        ),
        _lost_on_ray("scorer"),
    ),
    Promise(
        "On Ray: a lost worker node loses no request; its generator's requests are sampled again once elsewhere.",
        (
            "server/distributed/test_ray_faults.py::test_one_of_two_worker_nodes_is_removed",
            "server/distributed/test_ray_faults.py::test_the_last_worker_node_is_removed_and_another_joins",
        ),
        _lost_on_ray("node"),
    ),
    Promise(
        "Losing candidates and the requests of disconnected clients are cancelled in the engine; nothing leaks.",
        (
            "end_to_end/test_best_of_n.py::test_a_disconnect_cancels_candidates_in_the_engine",
            "end_to_end/test_reliability.py::test_a_hundred_disconnected_requests_leave_nothing_running",
        ),
        _cancelled,
    ),
    Promise(
        "SIGTERM: new requests are rejected with 503, requests in flight finish within `drain_s`, child processes end, "
        "exit code 0.",
        (
            "end_to_end/test_reliability.py::test_sigterm_lets_a_request_finish_and_leaves_no_process",
            "server/test_cli.py::test_after_sigterm_new_requests_are_refused_and_requests_in_flight_are_finished",
            "server/test_cli.py::test_a_request_that_outlasts_drain_s_is_503_with_a_retry_after",
        ),
        _stopped,
    ),
    Promise(
        "A long run with random faults returns no wrong answer, no request hangs, and memory does not grow.",
        ("python -m benchmarks.soak",),
        _soak,
    ),
)
