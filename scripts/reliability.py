"""The table of docs/reliability.md: what is promised, the tests that inject the fault, and what was measured.

The figures come from benchmarks/results; a promise whose result is missing says so. Tests are named as pytest does,
below tests/.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Results = Callable[[str], Any]
"""Name of a result -> what it holds, or None."""
NOT_YET = "not measured yet"


@dataclass(frozen=True, slots=True)
class Promise:
    """One row of the table."""

    says: str
    tests: tuple[str, ...]
    measured: Callable[[Results], str | None]


def table(results: Results) -> str:
    rows = [(one.says, one.tests, one.measured(results) or NOT_YET) for one in PROMISES]
    return "| promise | tests | measured |\n|---|---|---|\n" + "".join(
        f"| {says} | {'<br>'.join(f'`{test}`' for test in tests)} | {measured} |\n" for says, tests, measured in rows
    )


def _by_tests_alone(_: Results) -> str:
    return "exact, by the tests"


def _engine_killed(results: Results) -> str | None:
    found = (results("reliability") or {}).get("killed")
    if found is None:
        return None
    recovery_s = found["recovery_s"]
    return (
        f"{found['rounds']} kills under {found['in_flight']} requests each: {found['lost']} lost, "
        f"{found['statuses'].get('200', 0)} answered, {found['statuses'].get('503', 0)} told to come back; ready again "
        f"after {recovery_s['median']:.0f} s ({recovery_s['low']:.0f} … {recovery_s['high']:.0f})"
    )


def _lost_on_ray(fault: str) -> Callable[[Results], str | None]:
    def measured(results: Results) -> str | None:
        found = (results("reliability_ray") or {"faults": {}})["faults"].get(fault)
        if found is None:
            return None
        return (
            f"under {found['in_flight']} requests: {found['lost']} lost, {found['statuses'].get('200', 0)} answered, "
            f"{found['statuses'].get('503', 0)} told to come back; ready again after {found['recovery_s']:.0f} s"
        )

    return measured


def _cancelled(results: Results) -> str | None:
    found = (results("reliability") or {}).get("cancelled")
    if found is None:
        return None
    idle_s = found["engine_idle_after_s"]
    return (
        f"{found['requests']} requests, {found['cancelled_in_the_engine']} candidates cancelled; engine idle after "
        f"{idle_s['median']:.2f} s (at most {idle_s['high']:.2f}); left: {found['unfinished_in_the_engine']} in the "
        f"engine, {found['in_flight_after']:.0f} in flight; memory {found['memory']['growth']:+.1%}"
    )


def _stopped(results: Results) -> str | None:
    found = (results("reliability") or {}).get("stopped")
    if found is None:
        return None
    return (
        f"{found['statuses'].get('200', 0)} of {found['in_flight']} requests under way answered, new ones get "
        f"{found['new_requests_get']}; exit code {found['exit_code']} after {found['seconds']:.0f} s, "
        f"{found['processes_left']} processes left"
    )


def _soak(results: Results) -> str | None:
    found = results("soak")
    if found is None:
        return None
    requests, kills = sum(found["requests"].values()), sum(found["kills"].values())
    return (
        f"{found['minutes']:g} minutes, {requests} requests, {kills} kills: "
        f"{found['wrong']} wrong, {found['hung']} hung, {found['lost']} lost; memory "
        f"{found['server_memory']['growth']:+.1%} after warm-up"
    )


def _overloaded(results: Results) -> str | None:
    found = results("overload")
    if found is None:
        return None
    at_capacity, over = (found["loads"][multiple] for multiple in ("1x", "10x"))
    return (
        f"p95 of those admitted at 10 times capacity {over['p95_s']:.1f} s, at capacity {at_capacity['p95_s']:.1f} s: "
        f"{found['p95_ratio_last_to_first']:.2f} times; {over['status_429']} told to come back, "
        f"{sum(over['failed'].values())} failed; the server's memory {over['server_peak_rss_mib']:.0f} MiB at most "
        "(scripted engine)"
    )


PROMISES = (
    Promise(
        "One surviving candidate is enough for an answer, and the reply says how many failed.",
        (
            "server/pipeline/test_best_of_n.py::test_one_failed_candidate_does_not_fail_the_request",
            "server/pipeline/test_best_of_n.py::test_all_candidates_failed_is_an_error_with_the_reason",
            "server/test_app.py::test_a_failed_candidate_is_counted_and_was_never_compared",
        ),
        _by_tests_alone,
    ),
    Promise(
        "`deadline_s` returns the best so far, labelled; 504 only with nothing finished.",
        (
            "server/pipeline/test_best_of_n.py::TestDeadline::test_the_best_so_far_wins_and_the_rest_is_cancelled",
            "server/test_app.py::test_a_deadline_is_labelled_and_what_it_cut_off_was_compared",
            "server/test_app.py::test_a_deadline_with_nothing_finished_is_504",
            "server/generation/test_supervisor.py::test_a_deadline_ends_the_wait_for_the_next_engine",
        ),
        _by_tests_alone,
    ),
    Promise(
        "A reward failure follows `on_reward_failure`: never silent, never a 200 with error text.",
        (
            "server/pipeline/test_best_of_n.py::TestRewardFailure::test_a_fallback_is_labelled",
            "server/test_app.py::test_a_reward_failure_is_an_error_and_no_answer",
            "server/test_app_streaming.py::test_an_error_after_the_first_byte_is_the_last_event",
        ),
        _by_tests_alone,
    ),
    Promise(
        "An engine that is killed costs no request: those in flight are drawn again once or told to come back; "
        "`/ready` is 503 until the next engine is there, `/health` stays up. A `python:` scorer's process likewise.",
        (
            "end_to_end/test_reliability.py::test_an_engine_killed_during_twenty_requests_is_replaced_and_loses_none",
            "server/generation/test_supervisor.py::test_twenty_running_requests_are_answered_by_the_next_engine",
            "server/generation/test_supervisor.py::test_requests_do_not_wait_while_engines_die_one_after_another",
            "reranker/scorers/test_verifier.py::test_a_process_that_ends_between_calls_is_not_missed",
        ),
        _engine_killed,
    ),
    Promise(
        "Overload: what is above the queue is refused with 429 and a `Retry-After` that OpenAI's client honours; who "
        "is admitted waits no longer than the queue takes to drain.",
        (
            "server/http/test_admission.py::test_the_official_client_comes_back_when_it_was_told_to_and_is_served",
            "server/http/test_admission.py::test_at_ten_times_capacity_the_admitted_wait_no_longer_than_the_queue_takes_to_drain",
            "server/http/test_admission.py::test_over_capacity_is_429_with_the_time_to_come_back",
        ),
        _overloaded,
    ),
    Promise(
        "On Ray: an engine that is killed is replaced, and its requests are drawn again once.",
        ("server/distributed/test_ray_faults.py::test_the_engines_of_all_replicas_die",),
        _lost_on_ray("engine"),
    ),
    Promise(
        "On Ray: a generator replica that is killed is replaced, and its requests are drawn again once; its engine "
        "ends with it.",
        (
            "server/distributed/test_ray_faults.py::test_one_of_two_generator_replicas_is_killed",
            "server/distributed/test_ray_faults.py::test_all_generator_replicas_are_killed",
            "end_to_end/test_on_ray.py::test_a_generator_killed_during_twenty_requests_is_replaced_and_loses_none",
        ),
        _lost_on_ray("generator"),
    ),
    Promise(
        "On Ray: a scorer replica that is killed is replaced, and its candidates are scored again once.",
        (
            "server/distributed/test_ray_faults.py::test_one_of_two_scorer_replicas_is_killed",
            "server/distributed/test_ray_faults.py::test_all_scorer_replicas_are_killed",
        ),
        _lost_on_ray("scorer"),
    ),
    Promise(
        "On Ray: a worker node that is lost costs no request: what its generator had is drawn again once elsewhere.",
        (
            "server/distributed/test_ray_faults.py::test_one_of_two_worker_nodes_is_removed",
            "server/distributed/test_ray_faults.py::test_the_last_worker_node_is_removed_and_another_joins",
        ),
        _lost_on_ray("node"),
    ),
    Promise(
        "Losers and the work of clients that hang up are cancelled in the engine; nothing leaks.",
        (
            "end_to_end/test_best_of_n.py::test_a_disconnect_cancels_candidates_in_the_engine",
            "end_to_end/test_reliability.py::test_a_hundred_disconnected_requests_leave_nothing_running",
        ),
        _cancelled,
    ),
    Promise(
        "SIGTERM: new requests are refused with 503, those under way finish within `drain_s`, the children exit, exit "
        "code 0.",
        (
            "end_to_end/test_reliability.py::test_sigterm_lets_a_request_finish_and_leaves_no_process",
            "server/test_cli.py::test_sigterm_refuses_what_comes_and_finishes_what_is_under_way",
            "server/test_cli.py::test_what_outlasts_drain_s_is_told_to_come_back",
        ),
        _stopped,
    ),
    Promise(
        "A long run with faults at random gives no wrong answer, hangs nowhere and does not grow.",
        ("python -m benchmarks.soak",),
        _soak,
    ),
)
