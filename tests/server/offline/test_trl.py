"""TRL's trainers read the exports as they are: one step of each trainer on a tiny model.

The tests compare the tokens that a trainer reads with the exported texts, its loss with one that is computed here from
these texts, and for pairs the direction of the update: it must favour the text with the higher reward.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from server.offline.export import ExportOptions, Form, Format, run_export
from tests.server.offline.test_export import result, write_run
from tests.support.tiny_models import save_tiny_policy, save_tiny_reward_model

LINES = range(1, 5)
BEST, WORST = "a great film", "a dull film"
WORST_REWARD = 0.5
"""The best candidate of line L has the reward L; it is drawn first in odd lines and second in even ones."""
STEP: dict[str, Any] = {
    "max_steps": 1,
    "per_device_train_batch_size": len(LINES),
    "learning_rate": 1e-3,
    "report_to": "none",
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}


@pytest.fixture(params=["conversational", "plain"])
def form(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_policy(tmp_path_factory.mktemp("policy")))


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_reward_model(tmp_path_factory.mktemp("reward")))


class Texts:
    """The token ids that a trainer should read from the export in one form."""

    def __init__(self, model: str, form: Form) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(model)
        self._is_chat = form == "conversational"

    def prompt(self, line: int) -> list[int]:
        text = f"prompt {line}"
        return self._ids(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" if self._is_chat else text)

    def completion(self, text: str) -> list[int]:
        return self._ids(text + ("<|im_end|>\n" if self._is_chat else "<|im_end|>"))

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])


def exported(tmp_path: Path, format_: Format, form: Form) -> Any:
    results = []
    for line in LINES:
        candidates = [(float(line), BEST), (WORST_REWARD, WORST)]
        rewards, texts = zip(*(candidates if line % 2 else candidates[::-1]), strict=True)
        results.append(result(line, list(rewards), list(texts)))
    run_export(write_run(tmp_path / "run", results), tmp_path / "export.jsonl", ExportOptions(format_, form=form))
    return load_dataset("json", data_files=str(tmp_path / "export.jsonl"), cache_dir=str(tmp_path / "cache"))["train"]


@torch.no_grad()
def logprob(model: Any, prompt: list[int], completion: list[int]) -> float:
    """log p(completion | prompt) in nats."""
    logprobs_T_V = model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
    positions = range(len(prompt) - 1, len(prompt) + len(completion) - 1)
    return sum(float(logprobs_T_V[position, token]) for position, token in zip(positions, completion, strict=True))


@torch.no_grad()
def reward(model: Any, ids: list[int]) -> float:
    return float(model(torch.tensor([ids])).logits[0, 0])


def test_sft_learns_the_winner_and_only_the_completion(policy: str, tmp_path: Path, form: Form) -> None:
    texts = Texts(policy, form)
    model = AutoModelForCausalLM.from_pretrained(policy)
    winner = texts.completion(BEST)
    total = sum(logprob(model, texts.prompt(line), winner) for line in LINES)
    trainer = SFTTrainer(
        model=model,
        processing_class=AutoTokenizer.from_pretrained(policy),
        train_dataset=exported(tmp_path, "sft", form),
        args=SFTConfig(output_dir=str(tmp_path / "out"), **STEP),
    )
    for line, row in zip(LINES, trainer.train_dataset, strict=True):
        prompt = texts.prompt(line)
        assert row["input_ids"] == prompt + winner
        assert row["labels"] == [-100] * len(prompt) + winner
    assert trainer.train().training_loss == pytest.approx(-total / (len(LINES) * len(winner)), rel=1e-4)


def test_dpo_prefers_the_text_of_the_higher_reward(policy: str, tmp_path: Path, form: Form) -> None:
    texts = Texts(policy, form)
    model = AutoModelForCausalLM.from_pretrained(policy)
    best, worst = texts.completion(BEST), texts.completion(WORST)

    def margin() -> float:
        prompts = [texts.prompt(line) for line in LINES]
        return sum(logprob(model, prompt, best) - logprob(model, prompt, worst) for prompt in prompts) / len(LINES)

    trainer = DPOTrainer(
        model=model,
        ref_model=AutoModelForCausalLM.from_pretrained(policy),
        processing_class=AutoTokenizer.from_pretrained(policy),
        train_dataset=exported(tmp_path, "preference", form),
        args=DPOConfig(output_dir=str(tmp_path / "out"), **STEP),
    )
    for line, row in zip(LINES, trainer.train_dataset, strict=True):
        assert row["prompt_ids"] == texts.prompt(line)
        assert (row["chosen_ids"], row["rejected_ids"]) == (best, worst)
    before = margin()
    trainer.train()
    logged = trainer.state.log_history[-1]
    assert logged["logps/chosen"] - logged["logps/rejected"] == pytest.approx(before, abs=1e-3)
    assert margin() > before + 0.01


def test_a_reward_model_learns_the_exported_margin(reward_model: str, tmp_path: Path, form: Form) -> None:
    """The loss is −log σ(r_chosen − r_rejected − margin): TRL reads the column `margin`."""
    texts = Texts(reward_model, form)
    model = AutoModelForSequenceClassification.from_pretrained(reward_model, num_labels=1)
    pairs = [tuple(texts.prompt(line) + texts.completion(text) for text in (BEST, WORST)) for line in LINES]

    def differences() -> torch.Tensor:
        return torch.tensor([reward(model, chosen) - reward(model, rejected) for chosen, rejected in pairs])

    trainer = RewardTrainer(
        model=model,
        processing_class=AutoTokenizer.from_pretrained(reward_model),
        train_dataset=exported(tmp_path, "preference", form),
        args=RewardConfig(output_dir=str(tmp_path / "out"), **STEP),
    )
    assert [(row["chosen_ids"], row["rejected_ids"]) for row in trainer.train_dataset] == pairs
    before = differences()
    margins = torch.tensor([line - WORST_REWARD for line in LINES])
    expected_loss = -torch.nn.functional.logsigmoid(before - margins).mean()
    assert trainer.train().training_loss == pytest.approx(float(expected_loss), rel=1e-4)
    assert differences().mean() > before.mean() + 0.01
