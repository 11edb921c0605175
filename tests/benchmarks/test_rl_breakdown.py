"""The memory and time breakdown of a training run, with figures that can be checked by hand."""

import time
from collections.abc import Iterator

import pytest

from benchmarks.rl_breakdown import breakdown
from reranker.scorers.busy_time import OverlapTimer


def test_overlapping_calls_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two calls from 10 to 13, and another from 20 to 21."""
    clock: Iterator[float] = iter([10.0, 13.0, 20.0, 21.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    timer = OverlapTimer()
    with timer, timer:
        assert timer.seconds == 0
    with timer:
        assert timer.seconds == 3
    assert timer.seconds == 4


def test_phases_share_the_seconds_of_all_steps_and_scoring_is_part_of_the_rollout() -> None:
    steps = [
        {"rollout_s": 3.0, "reward_s": 1.0, "learning_s": 5.0, "sync_s": 1.0, "peak_memory_mib": 3.0},
        {"rollout_s": 1.0, "reward_s": 1.0, "learning_s": 9.0, "sync_s": 1.0, "peak_memory_mib": 2.0},
    ]
    figures = breakdown({"held": {"base": 8}, "peak_rss": 2**20, "engine_rss": 7}, steps)
    assert figures["share_of_time"] == {"rollout": 0.2, "learning": 0.7, "sync": 0.1, "reward": 0.1}
    assert figures["seconds_a_step"] == 10
    assert figures["peak_rss_bytes"] == 3 * 2**20
    assert (figures["held_bytes"], figures["engine_rss_bytes"]) == ({"base": 8}, 7)
