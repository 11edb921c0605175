"""The figures, table and plot of `benchmarks.rl`, from runs with known samples."""

import csv
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks import plot, rl
from benchmarks.policy_evaluation import JudgedSample, best_of_n, distinct
from scripts import doc_tables


def pools(rewards: list[float], nats: float) -> list[list[JudgedSample]]:
    return [[JudgedSample("This film", f" is {reward}", reward, 0.5, 10, -20.0, nats) for reward in rewards]] * 2


@pytest.fixture
def result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(rl, "train", lambda out, method, seed: out / f"{method}-{seed}")
    (tmp_path / "judged").mkdir()
    runs: dict[str, Any] = {}
    for method, seed, reward in (("ppo", 0, 6.0), ("ppo", 1, 8.0), ("reinforce", 0, 7.0)):
        run = tmp_path / f"{method}-{seed}"
        run.mkdir()
        samples = [asdict(sample) for pool in pools([reward, reward + 1], -15.0) for sample in pool]
        (tmp_path / "judged" / f"{run.name}.json").write_text(json.dumps(samples))
        with (run / "metrics.csv").open("w") as file:
            table = csv.DictWriter(file, [*rl.KEPT, "value_loss"])
            table.writeheader()
            table.writerows(
                dict.fromkeys(rl.KEPT, 1.0) | dict(zip(rl.SECONDS, (60.0, 30.0, 0.0), strict=True)) for _ in range(4)
            )
        runs.setdefault(method, {})[str(seed)] = rl.measure(tmp_path, method, seed)
    base = pools([float(reward) for reward in range(32)], -20.0)
    return {
        "policy": "smollm2",
        "reward_model": "movie-sentiment",
        "prompts": {"train": 48, "held_out": 2},
        "max_tokens": 32,
        "best_of_n_of_the_base": best_of_n(base),
        "distinct_first_words_of_the_base": distinct(base),
        "runs": runs,
    }


def test_a_run_is_measured_by_its_samples_and_its_steps(result: dict[str, Any]) -> None:
    run = result["runs"]["ppo"]["1"]
    assert run["held_out"]["reward"]["mean"] == pytest.approx(8.5)
    assert run["held_out"]["kl"]["mean"] == pytest.approx(5.0)
    assert run["seconds"] == {"rollout_s": 240.0, "learning_s": 120.0, "sync_s": 0.0}
    assert len(run["steps"]) == 4


def test_the_table_and_the_plot_show_the_result(
    result: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plot, "FIGURES", tmp_path)
    assert plot.rl(result).stat().st_size > 0
    monkeypatch.setattr(doc_tables, "read_result", lambda name: result)
    table = doc_tables.rl()
    assert "| ppo, seed 1, best of 1 | 8.50 (8.50 … 8.50) |" in table
    assert "ppo: 6 to 6 minutes a run (rollout 67 %, learning 33 %, sync 0 %)" in table
