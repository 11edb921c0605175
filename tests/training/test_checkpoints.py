"""A resumed run ends as an uninterrupted run, and a run never resumes from the checkpoints of another."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.tiny_models import save_tiny_policy
from training.checkpoints import CheckpointError, start
from training.reward.config import RewardMethod, RewardTraining
from training.reward.train import RewardTrainer, train_reward

pytestmark = pytest.mark.slow


class PowerCutError(Exception):
    """Stands for anything that kills a run."""


def cut_power_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    compute_loss = RewardTrainer.compute_loss

    def compute(trainer: RewardTrainer, *arguments: Any, **more: Any) -> torch.Tensor:
        if trainer.state.global_step == step:
            raise PowerCutError
        return compute_loss(trainer, *arguments, **more)

    monkeypatch.setattr(RewardTrainer, "compute_loss", compute)


def write_ratings(path: Path, count: int) -> Path:
    path.write_text(
        "".join(json.dumps({"text": f"film {i} " + "great " * (i % 7), "rating": i % 7}) + "\n" for i in range(count))
    )
    return path


def settings(base: Path, method: RewardMethod = "lora", **more: Any) -> RewardTraining:
    fixed: dict[str, Any] = {
        "style": "document",
        "epochs": 2,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "dtype": "float32",
    }
    return RewardTraining(base_model=str(base), method=method, **(fixed | more))


@pytest.mark.parametrize(
    ("method", "rows", "cut"),
    [
        ("lora", 46, 15),  # 12 steps per epoch: resumes at step 10, within the first epoch
        ("lora", 46, 22),  # resumes at step 20, within the second epoch
        ("full", 40, 17),  # 10 steps per epoch: resumes between two epochs
    ],
)
def test_an_interrupted_run_ends_as_an_uninterrupted_run(
    method: RewardMethod, rows: int, cut: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = settings(save_tiny_policy(tmp_path / "base"), method)
    data, held_out = write_ratings(tmp_path / "train.jsonl", rows), write_ratings(tmp_path / "test.jsonl", 10)

    def train(out: str, *, resume: bool) -> None:
        train_reward(
            data, tmp_path / out, run, validation_data=held_out, checkpoint_every=10, resume=resume, progress=False
        )

    train("whole", resume=False)
    with monkeypatch.context() as patch:
        cut_power_at(cut, patch)
        with pytest.raises(PowerCutError):
            train("cut", resume=False)
    with pytest.raises(CheckpointError, match="continue from the last one with --resume"):
        train("cut", resume=False)
    train("cut", resume=True)

    weights = {"lora": "adapter/adapter_model.safetensors", "full": "model/model.safetensors"}[method]
    for file in (weights, "metrics.csv", f"{weights.partition('/')[0]}/reward_config.json"):
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file


def save_checkpoint(directory: Path, step: int, state: str = "{}") -> Path:
    checkpoint = directory / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text(state)
    return checkpoint


def test_a_run_resumes_from_the_last_complete_checkpoint(tmp_path: Path) -> None:
    assert start(tmp_path / "run", {"seed": 0}, resume=True) is None
    save_checkpoint(tmp_path / "run", 9)
    last = save_checkpoint(tmp_path / "run", 10)
    save_checkpoint(tmp_path / "run", 11, state='{"global_st')
    assert start(tmp_path / "run", {"seed": 0}, resume=True) == last


def test_a_run_with_other_settings_does_not_resume_from_these_checkpoints(tmp_path: Path) -> None:
    start(tmp_path / "run", {"seed": 0, "epochs": 1.0}, resume=False)
    save_checkpoint(tmp_path / "run", 10)
    with pytest.raises(CheckpointError, match="a run with another seed: resume it with the values it was started with"):
        start(tmp_path / "run", {"seed": 1, "epochs": 1.0}, resume=True)
