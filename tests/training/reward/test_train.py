import csv
import json
import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import GraniteConfig, PretrainedConfig, T5Config
from typer.testing import CliRunner

from reranker.candidate import Prompt
from reranker.models.reward_model import RewardModel, RewardModelError, load_classifier
from tests.support.tiny_models import Architecture, save_tiny_policy, save_tiny_reward_model
from training.cli import evaluate_app, train_app
from training.data.preferences import DataError
from training.reward.config import RewardMethod, RewardTraining
from training.reward.evaluate import evaluate_reward
from training.reward.train import _trainable, train_reward

pytestmark = pytest.mark.slow


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def ratings(count: int, seed: int) -> list[dict[str, Any]]:
    """Rated texts: good with the word great, bad with the word dull, among words that do not matter."""
    rng = random.Random(seed)
    lines: list[dict[str, Any]] = []
    for _ in range(count):
        good = rng.random() < 0.5
        words = [*rng.choices(["film", "cast", "start", "ending", "capital"], k=5), "great" if good else "dull"]
        rng.shuffle(words)
        lines.append({"text": " ".join(words), "rating": 2.0 if good else -2.0})
    return lines


def settings(base: Path, **more: Any) -> RewardTraining:
    defaults: dict[str, Any] = {"style": "document", "epochs": 6, "batch_size": 16, "learning_rate": 1e-2}
    return RewardTraining(base_model=str(base), dtype="float32", **(defaults | more))


@pytest.mark.parametrize("method", ["lora", "head", "full"])
def test_training_learns_the_ratings_and_the_saved_model_reproduces_them(method: RewardMethod, tmp_path: Path) -> None:
    base = save_tiny_policy(tmp_path / "base")
    train, test = write(tmp_path / "train.jsonl", ratings(200, 0)), write(tmp_path / "test.jsonl", ratings(60, 1))
    out = tmp_path / "out"
    validated = train_reward(train, out, settings(base, method=method), validation_data=test, progress=False)
    saved = str(out / {"lora": "adapter", "head": "adapter", "full": "model"}[method])
    model = RewardModel.load(saved, device="cpu", dtype="float32")
    assert model.renderer.style == "document"  # the style of training, although the tokenizer has a chat template
    loaded = evaluate_reward(model, test).overall
    assert validated is not None
    assert loaded.accuracy == pytest.approx(validated.accuracy, abs=0.01)
    # The head reads little from a random trunk; adapters make the trunk detect the word that matters.
    assert loaded.accuracy > {"head": 0.6, "lora": 0.95, "full": 0.95}[method]
    with (out / "metrics.csv").open() as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]
    assert losses[-1] < losses[0]
    assert (out / "metrics.png").stat().st_size > 0
    assert not (out / "checkpoints").exists()
    logged = EventAccumulator(str(out / "tensorboard")).Reload().Scalars("loss")
    assert [event.value for event in logged] == pytest.approx(losses)


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "qwen3_moe"])
def test_every_kind_of_decoder_can_be_trained_and_loaded(architecture: Architecture, tmp_path: Path) -> None:
    base = save_tiny_policy(tmp_path / "base", architecture=architecture)
    lines = ratings(16, 0)
    data = write(tmp_path / "train.jsonl", lines)
    train_reward(data, tmp_path / "out", settings(base, epochs=1, num_layers=1), holdout=0, progress=False)
    model = RewardModel.load(str(tmp_path / "out" / "adapter"), device="cpu", dtype="float32")
    texts = [model.render(Prompt(text=""), line["text"]) for line in lines]
    rewards = model.score(texts)
    assert max(rewards) - min(rewards) > 0.01
    assert rewards == pytest.approx([model.score([text])[0] for text in texts], abs=1e-4)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (GraniteConfig(architectures=["GraniteForCausalLM"]), "no sequence classifier of the type granite"),
        (T5Config(architectures=["T5ForConditionalGeneration"]), "an encoder-decoder"),
    ],
)
def test_a_base_that_cannot_carry_a_reward_head_is_refused_in_one_sentence(
    config: PretrainedConfig, reason: str, tmp_path: Path
) -> None:
    config.save_pretrained(tmp_path / "base")
    data = write(tmp_path / "train.jsonl", ratings(8, 0))
    with pytest.raises(RewardModelError, match=reason) as refusal:
        train_reward(data, tmp_path / "out", settings(tmp_path / "base"), holdout=0, progress=False)
    assert "\n" not in str(refusal.value)


def test_the_base_model_is_unchanged_and_only_the_adapter_is_written(tmp_path: Path) -> None:
    base = save_tiny_policy(tmp_path / "base")
    before = (base / "model.safetensors").read_bytes()
    data = write(tmp_path / "train.jsonl", ratings(40, 0))
    train_reward(data, tmp_path / "out", settings(base, epochs=1), holdout=0, progress=False)
    assert (base / "model.safetensors").read_bytes() == before
    written = {path.name for path in (tmp_path / "out" / "adapter").iterdir()}
    assert written == {"adapter_config.json", "adapter_model.safetensors", "reward_config.json"}


def test_the_same_seed_gives_the_same_adapter(tmp_path: Path) -> None:
    base = save_tiny_policy(tmp_path / "base")
    data = write(tmp_path / "train.jsonl", ratings(40, 0))
    adapters = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train_reward(data, tmp_path / name, settings(base, epochs=1, seed=seed), holdout=0, progress=False)
        adapters.append((tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes())
    assert adapters[0] == adapters[1] != adapters[2]


def test_the_command_trains_on_pairs_with_prompts(tmp_path: Path) -> None:
    base = save_tiny_policy(tmp_path / "base")
    pairs = [
        {"prompt": f"film {i}", "chosen": [{"role": "assistant", "content": f"great {i % 7}"}],
         "rejected": [{"role": "assistant", "content": f"dull {i % 5}"}]}
        for i in range(80)
    ]  # fmt: skip
    data = write(tmp_path / "pairs.jsonl", pairs)
    out = tmp_path / "out"
    # --resume starts a run without checkpoints, so one command both starts and resumes a job that may be killed.
    options = [
        "--resume",
        "--checkpoint-every",
        "5",
        "--epochs",
        "4",
        "--learning-rate",
        "0.01",
        "--batch-size",
        "16",
        "--dtype",
        "float32",
    ]
    result = CliRunner().invoke(
        train_app, ["reward", "--data", str(data), "--out", str(out), "--model", str(base), *options]
    )
    assert result.exit_code == 0, result.output
    assert "comparisons in the right order" in result.output
    evaluated = CliRunner().invoke(
        evaluate_app, ["reward", "--data", str(data), "--reward-model", str(out / "adapter"), "--device", "cpu"]
    )
    assert evaluated.exit_code == 0, evaluated.output
    model = RewardModel.load(str(out / "adapter"), device="cpu", dtype="float32")
    prompt = Prompt(text="film 3")
    assert model.renderer.style == "chat"
    assert len(model.score([model.render(prompt, "great 3"), model.render(prompt, "dull 3")])) == 2


def test_all_bad_lines_are_reported_before_any_training(tmp_path: Path) -> None:
    data = write(tmp_path / "bad.jsonl", [*ratings(3, 0), {"text": 5, "rating": 1}, {"chosen": "a"}])
    result = CliRunner().invoke(train_app, ["reward", "--data", str(data), "--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert f"{data}:4: text is not a string" in result.output
    assert f"{data}:5: the fields are chosen" in result.output
    assert not (tmp_path / "out").exists()


def test_the_commands_import_nothing_heavy_before_they_run() -> None:
    code = "import sys, training.cli; print([m for m in ('torch', 'transformers', 'peft') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_a_model_that_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    data = write(tmp_path / "train.jsonl", ratings(20, 0))
    encoder = save_tiny_reward_model(tmp_path / "bert", "bert")
    with pytest.raises(RewardModelError, match="is an encoder"):
        train_reward(data, tmp_path / "out", settings(encoder), holdout=0, progress=False)
    policy = save_tiny_policy(tmp_path / "base", num_layers=2)
    with pytest.raises(RewardModelError, match="lacks the weights"):
        train_reward(data, tmp_path / "out", settings(policy, num_layers=3), holdout=0, progress=False)


def test_a_run_that_diverges_saves_no_model(tmp_path: Path) -> None:
    data = write(tmp_path / "train.jsonl", ratings(64, 0))
    run = settings(save_tiny_policy(tmp_path / "base"), learning_rate=1e30, epochs=1)
    with pytest.raises(RewardModelError, match="training diverged"):
        train_reward(data, tmp_path / "out", run, holdout=0, progress=False)
    assert not (tmp_path / "out" / "adapter").exists()


def test_a_batch_size_without_comparisons_is_refused_before_training(tmp_path: Path) -> None:
    data = write(tmp_path / "train.jsonl", ratings(20, 0))
    with pytest.raises(DataError, match="a batch of 1 has no comparison"):
        train_reward(data, tmp_path / "out", settings(tmp_path, batch_size=1), holdout=0, progress=False)


def test_the_initial_head_gives_rewards_of_order_one(tmp_path: Path) -> None:
    base = save_tiny_policy(tmp_path / "base")
    classifier = load_classifier(str(base), new_head=True)
    heads = torch.stack(
        [_trainable(classifier, settings(base, method="full")).score.weight.detach().clone() for _ in range(64)]
    )
    # 64 heads of d = 32 weights: 2,048 numbers, whose deviation is known to 1.6%; 10% is six times that.
    assert heads.numel() == 2048
    assert float(heads.std()) == pytest.approx(1 / math.sqrt(32 + 1), rel=0.1)
    assert float(heads.mean()) == pytest.approx(0.0, abs=0.02)


def test_texts_with_equal_ratings_are_refused_before_training(tmp_path: Path) -> None:
    data = write(tmp_path / "flat.jsonl", [{"text": f"film {i}", "rating": 1.0} for i in range(9)])
    with pytest.raises(DataError, match="the rows trained on give no comparison"):
        train_reward(data, tmp_path / "out", settings(tmp_path), holdout=0, progress=False)
