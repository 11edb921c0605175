"""What is told of a run's memory, time and speed, by numbers that can be checked in the head."""

import time
from collections.abc import Iterator

import pytest

from reranker.scorers.busy import Busy
from training.rl.account import account
from training.rl.learner_speed import shares


def test_overlapping_calls_are_busy_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """From 10 to 13 two of them, and from 20 to 21 one more."""
    clock: Iterator[float] = iter([10.0, 13.0, 20.0, 21.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    busy = Busy()
    with busy, busy:
        assert busy.seconds == 0
    with busy:
        assert busy.seconds == 3
    assert busy.seconds == 4


def test_phases_share_the_time_of_all_steps_and_scoring_lies_within_the_rollout() -> None:
    steps = [
        {"rollout_s": 3.0, "reward_s": 1.0, "learning_s": 5.0, "sync_s": 1.0, "peak_memory_mib": 3.0},
        {"rollout_s": 1.0, "reward_s": 1.0, "learning_s": 9.0, "sync_s": 1.0, "peak_memory_mib": 2.0},
    ]
    found = account({"held": {"base": 8}, "peak_rss": 2**20, "engine_rss": 7}, steps)
    assert found["share_of_time"] == {"rollout": 0.2, "learning": 0.7, "sync": 0.1, "reward": 0.1}
    assert found["seconds_a_step"] == 10
    assert found["peak_rss_bytes"] == 3 * 2**20
    assert (found["held_bytes"], found["engine_rss_bytes"]) == ({"base": 8}, 7)


def test_readings_are_spread_over_the_passes_after_them() -> None:
    """Bare 8 s a pass, ours 8 and 2 of readings: 1 alone, 8/10 with one pass, 32/34 with four; half that when slow."""
    seconds = [{"bare": 8.0, "pass": 8.0, "readings": 2.0}, {"bare": 8.0, "pass": 16.0, "readings": 4.0}]
    alone = shares(seconds, passes=1, readings=False)
    assert alone == {"median": 0.75, "low": 0.5, "high": 1.0, "rounds": 2}
    assert shares(seconds, passes=1, readings=True)["high"] == pytest.approx(0.8)
    assert shares(seconds, passes=4, readings=True)["high"] == pytest.approx(32 / 34)
