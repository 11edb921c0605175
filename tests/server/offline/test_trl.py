"""TRL's trainers take the exports as they are: a step of each, on models of a few kilobytes."""

from pathlib import Path
from typing import Any

import pytest
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from server.offline.export import ExportOptions, Format, run_export
from tests.server.offline.test_export import result, write_run
from tests.support.tiny_models import save_tiny_policy, save_tiny_reward_model

STEP: dict[str, Any] = {
    "max_steps": 1,
    "per_device_train_batch_size": 2,
    "report_to": "none",
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}


@pytest.fixture(params=["conversational", "plain"])
def form(request: pytest.FixtureRequest) -> Any:
    return request.param


def exported(tmp_path: Path, kind: Format, form: Any) -> Any:
    texts = ["a great film", "a dull film"]
    directory = write_run(tmp_path / "run", [result(line, [line, 0.5], texts) for line in range(1, 5)])
    run_export(directory, tmp_path / "export.jsonl", ExportOptions(kind, form=form))
    return load_dataset("json", data_files=str(tmp_path / "export.jsonl"), cache_dir=str(tmp_path / "cache"))["train"]


def test_sft(tmp_path: Path, form: Any) -> None:
    policy = str(save_tiny_policy(tmp_path / "policy"))
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(policy),
        processing_class=AutoTokenizer.from_pretrained(policy),
        train_dataset=exported(tmp_path, "sft", form),
        args=SFTConfig(output_dir=str(tmp_path / "out"), **STEP),
    )
    assert trainer.train().training_loss > 0


def test_dpo(tmp_path: Path, form: Any) -> None:
    policy = str(save_tiny_policy(tmp_path / "policy"))
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(policy),
        ref_model=AutoModelForCausalLM.from_pretrained(policy),
        processing_class=AutoTokenizer.from_pretrained(policy),
        train_dataset=exported(tmp_path, "preference", form),
        args=DPOConfig(output_dir=str(tmp_path / "out"), **STEP),
    )
    assert trainer.train().training_loss > 0


def test_reward(tmp_path: Path, form: Any) -> None:
    reward_model = str(save_tiny_reward_model(tmp_path / "reward"))
    trainer = RewardTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(reward_model, num_labels=1),
        processing_class=AutoTokenizer.from_pretrained(reward_model),
        train_dataset=exported(tmp_path, "preference", form),
        args=RewardConfig(output_dir=str(tmp_path / "out"), **STEP),
    )
    assert trainer.train().training_loss > 0
