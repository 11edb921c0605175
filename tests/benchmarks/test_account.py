"""What is told of a run's memory, time and speed, by numbers that can be checked in the head."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.account import Step, account
from benchmarks.learner_speed import shares
from benchmarks.overlap_speed import Round, by_turns, figures
from reranker.scorers.busy_time import OverlapTimer
from tests.support.tiny_models import save_tiny_policy
from tests.training.rl.test_train import World, settings_of
from training.rl.config import PPOTraining


def test_overlapping_calls_are_busy_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """From 10 to 13 two of them, and from 20 to 21 one more."""
    clock: Iterator[float] = iter([10.0, 13.0, 20.0, 21.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    busy = OverlapTimer()
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


def step(rollout_s: float, learning_s: float, importance: float) -> Step:
    return {"rollout_s": rollout_s, "learning_s": learning_s, "sync_s": 1.0, "mismatch": 0.5, "importance": importance}


def test_overlapping_is_compared_with_in_turn_round_by_round() -> None:
    """10 s against 5, and 10 in the middle of 9, 10 and 12 against 8: 2 and 5/4 times as fast."""
    rounds: list[Round] = [
        {"in turn": [step(4, 5, 1)], "overlapping": [step(0, 4, 1.1)]},
        {"in turn": [step(4, 5, 1), step(3, 5, 1), step(4, 7, 1)], "overlapping": [step(1, 6, 1.3)]},
    ]
    found = figures(rounds)
    assert found["times_as_fast"] == {"median": 1.625, "low": 1.25, "high": 2.0, "rounds": 2}
    assert found["ways"]["in turn"]["step_s"] == {"median": 10, "low": 9, "high": 12, "rounds": 4}
    overlapping = found["ways"]["overlapping"]
    assert (overlapping["rollout_s"], overlapping["learning_s"], overlapping["sync_s"]) == (0.5, 5.0, 1.0)
    assert (overlapping["mismatch"], overlapping["importance"]) == (0.5, pytest.approx(1.2))


async def test_both_ways_run_by_turns_on_one_engine_and_their_steps_between_the_ends_count(tmp_path: Path) -> None:
    base = save_tiny_policy(tmp_path / "base")
    world, settings = World(base), settings_of("ppo", base, steps=4)
    assert isinstance(settings, PPOTraining)
    rounds = await by_turns(tmp_path, settings, 2, world.start)
    assert len(world.generators) == 1
    told = [{way: [(one["step"], one["staleness"]) for one in steps] for way, steps in each.items()} for each in rounds]
    assert told == [{"in turn": [(2, 0), (3, 0)], "overlapping": [(2, 1), (3, 1)]}] * 2
    assert json.dumps(figures(rounds))
