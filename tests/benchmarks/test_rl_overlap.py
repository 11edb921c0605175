import json
from pathlib import Path

import pytest

from benchmarks.rl_breakdown import Step
from benchmarks.rl_overlap import Round, alternating_runs, figures
from tests.support.tiny_models import save_tiny_policy
from tests.training.rl.test_train import RecordedBackend, settings_of
from training.rl.config import PPOTraining


def step(rollout_s: float, learning_s: float, importance: float) -> Step:
    return {"rollout_s": rollout_s, "learning_s": learning_s, "sync_s": 1.0, "mismatch": 0.5, "importance": importance}


def test_overlapping_is_compared_with_in_turn_round_by_round() -> None:
    """Round 1: 10 s against 5. Round 2: the median of 9, 10 and 12 s against 8. So 2 and 5/4 times as fast."""
    rounds: list[Round] = [
        {"in turn": [step(4, 5, 1)], "overlapping": [step(0, 4, 1.1)]},
        {"in turn": [step(4, 5, 1), step(3, 5, 1), step(4, 7, 1)], "overlapping": [step(1, 6, 1.3)]},
    ]
    result = figures(rounds)
    assert result["times_as_fast"] == {"median": 1.625, "low": 1.25, "high": 2.0, "rounds": 2}
    assert result["ways"]["in turn"]["step_s"] == {"median": 10, "low": 9, "high": 12, "rounds": 4}
    overlapping = result["ways"]["overlapping"]
    assert (overlapping["rollout_s"], overlapping["learning_s"], overlapping["sync_s"]) == (0.5, 5.0, 1.0)
    assert (overlapping["mismatch"], overlapping["importance"]) == (0.5, pytest.approx(1.2))


async def test_both_ways_alternate_on_one_engine_and_the_first_and_last_steps_are_not_counted(tmp_path: Path) -> None:
    base = save_tiny_policy(tmp_path / "base")
    backend, settings = RecordedBackend(base), settings_of("ppo", base, steps=4)
    assert isinstance(settings, PPOTraining)
    rounds = await alternating_runs(tmp_path, settings, 2, backend.start)
    assert len(backend.generators) == 1
    counted = [
        {way: [(row["step"], row["staleness"]) for row in steps] for way, steps in steps_by_way.items()}
        for steps_by_way in rounds
    ]
    assert counted == [{"in turn": [(2, 0), (3, 0)], "overlapping": [(2, 1), (3, 1)]}] * 2
    assert json.dumps(figures(rounds))
