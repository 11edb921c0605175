"""Fine-tuning by `nbest train sft` and `nbest train dpo`: what is learnt, what is masked, and what is written."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils import save_and_load
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTTrainer
from typer.testing import CliRunner

from reranker.candidate import Message, Prompt
from tests.support.tiny_models import save_tiny_policy, tiny_tokenizer
from training.checkpoints import CheckpointError
from training.cli import train_app
from training.data.demonstrations import demonstration
from training.data.preferences import DataError, read_rows
from training.errors import TrainingError
from training.policy.config import DPOTraining, RunOptions, SFTTraining
from training.policy.dpo import TokenisedDPOTrainer, train_dpo
from training.policy.finetune import TrainablePolicy, write_adapter
from training.policy.sft import train_sft
from training.policy.tokens import tokenise

pytestmark = pytest.mark.slow

QUIET = RunOptions(progress=False)
CHAT = [{"role": "user", "content": "How was the film?"}]


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def logged(out: Path, column: str) -> list[float]:
    with (out / "metrics.csv").open() as file:
        return [float(row[column]) for row in csv.DictReader(file) if row[column]]


def log_prob(policy: Any, prompt_ids: list[int], completion_ids: list[int]) -> list[float]:
    """The log-probability of each token of the completion, by the definition."""
    with torch.inference_mode():
        logits_T_V = policy(torch.tensor([prompt_ids + completion_ids])).logits[0].log_softmax(-1)
    positions = range(len(prompt_ids) - 1, len(prompt_ids) + len(completion_ids) - 1)
    return [float(logits_T_V[position, token_id]) for position, token_id in zip(positions, completion_ids, strict=True)]


def small(base: Path, **more: Any) -> dict[str, Any]:
    return {"base_model": str(base), "dtype": "float32", "batch_size": 4, "learning_rate": 1e-2} | more


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_tiny_policy(tmp_path / "base")


def test_a_prompt_has_the_tokens_of_the_engine_and_eos_is_learnt_unless_the_completion_was_cut(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    lines: list[dict[str, Any]] = [
        {"prompt": "The film", "completion": " was great."},
        {"prompt": "The film", "completion": " was great.", "finish_reason": "length"},
        {"prompt": CHAT, "completion": assistant("Great."), "finish_reason": "stop"},
        {"messages": CHAT + assistant("Great.")},
        {"text": "The film was dull."},
    ]
    rows = read_rows(write(tmp_path / "data.jsonl", lines), demonstration)
    tokenised = tokenise(rows, tokenizer, 128, "data.jsonl")
    eos = "<|im_end|>"
    texts = [(tokenizer.decode(row.prompt_ids), tokenizer.decode(row.completions[0])) for row in tokenised]
    chat = "<|im_start|>user\nHow was the film?<|im_end|>\n<|im_start|>assistant\n"
    assert texts == [
        ("The film", " was great." + eos),
        ("The film", " was great."),
        (chat, "Great." + eos),
        (chat, "Great." + eos),
        ("", "The film was dull." + eos),
    ]
    # Tokenised as one text, a token could span the border of prompt and completion.
    assert tokenised[0].prompt_ids == tokenizer("The film")["input_ids"]


def test_a_long_completion_is_truncated_and_a_prompt_that_leaves_no_room_is_refused(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    rows = read_rows(
        write(tmp_path / "data.jsonl", [{"prompt": "The", "completion": " film was great"}]), demonstration
    )
    whole = tokenise(rows, tokenizer, 128, "data")[0]
    room = len(whole.prompt_ids) + 2
    assert tokenise(rows, tokenizer, room, "data")[0].completions == [whole.completions[0][:2]]
    with pytest.raises(DataError, match=r"data:1: the prompt has .* so no completion fits"):
        tokenise(rows, tokenizer, len(whole.prompt_ids), "data")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": "a"}, "the fields are prompt; a line has prompt and completion, or messages, or text"),
        ({"prompt": "a", "completion": assistant("b")}, "prompt has to be messages too"),
        ({"messages": assistant("b")}, "after at least one other message"),
        ({"messages": CHAT}, "messages have to end with one of the role assistant"),
        ({"prompt": "a", "completion": "", "finish_reason": "length"}, "nothing to learn"),
        ({"prompt": 3, "completion": "b"}, "prompt is neither a string nor a list of messages"),
    ],
)
def test_a_bad_line_is_reported_with_its_number_before_any_training(
    line: Any, message: str, tmp_path: Path, base: Path
) -> None:
    data = write(tmp_path / "data.jsonl", [{"prompt": "a", "completion": "b"}, line])
    options = ["--data", str(data), "--out", str(tmp_path / "out"), "--model", str(base)]
    result = CliRunner().invoke(train_app, ["sft", *options])
    assert result.exit_code == 1
    assert f"{data}:2: " in result.output
    assert message in result.output
    assert not (tmp_path / "out").exists()


def test_a_conversation_is_read_as_the_prompt_of_a_chat_request(tmp_path: Path) -> None:
    (row,) = read_rows(write(tmp_path / "data.jsonl", [{"messages": CHAT + assistant("Great.")}]), demonstration)
    assert row.prompt == Prompt(messages=(Message("user", "How was the film?"),))
    assert row.texts == ("Great.",)


def test_the_loss_of_sft_is_that_of_the_completion_alone(tmp_path: Path, base: Path) -> None:
    """At learning rate 0 it is the base model's: minus the mean log-probability of the completion's tokens."""
    lines = [{"prompt": CHAT, "completion": assistant("The film was great.")}]
    data = write(tmp_path / "data.jsonl", lines)
    settings = SFTTraining(**small(base, learning_rate=0.0))
    train_sft(data, tmp_path / "out", settings, QUIET, validation_data=data)
    tokenizer = AutoTokenizer.from_pretrained(base)
    (row,) = tokenise(read_rows(data, demonstration), tokenizer, 128, data)
    of_tokens = log_prob(AutoModelForCausalLM.from_pretrained(base), row.prompt_ids, row.completions[0])
    assert logged(tmp_path / "out", "validation_loss") == pytest.approx([-sum(of_tokens) / len(of_tokens)], abs=1e-4)


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_sft_learns_the_demonstrations(full: bool, tmp_path: Path, base: Path) -> None:
    data = write(tmp_path / "data.jsonl", [{"prompt": CHAT, "completion": assistant("great")}] * 8)
    settings = SFTTraining(**small(base, epochs=20, full=full))
    written = train_sft(data, tmp_path / "out", settings, QUIET, holdout=0)
    policy = AutoModelForCausalLM.from_pretrained(base if not full else written)
    policy = policy if full else PeftModel.from_pretrained(policy, written)
    (row, *_) = tokenise(read_rows(data, demonstration), AutoTokenizer.from_pretrained(base), 128, data)
    with torch.inference_mode():
        answer = policy.generate(torch.tensor([row.prompt_ids]), max_new_tokens=8, do_sample=False)[0]
    assert answer[len(row.prompt_ids) :].tolist() == row.completions[0]  # EOS included
    losses = logged(tmp_path / "out", "loss")
    assert losses[-1] < losses[0]
    assert (tmp_path / "out" / "metrics.png").stat().st_size > 0
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_a_merged_model_has_the_logits_of_base_and_adapter(tmp_path: Path, base: Path) -> None:
    before = (base / "model.safetensors").read_bytes()
    data = write(tmp_path / "data.jsonl", [{"prompt": "The film", "completion": " was great"}] * 8)
    options = RunOptions(merge=True, progress=False)
    written = train_sft(data, tmp_path / "out", SFTTraining(**small(base, epochs=5)), options, holdout=0)
    assert written == tmp_path / "out" / "model"
    ids = AutoTokenizer.from_pretrained(written)("The film was", return_tensors="pt")["input_ids"]
    base_policy = AutoModelForCausalLM.from_pretrained(base)
    with torch.inference_mode():
        untrained = base_policy(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(written)(ids).logits
        adapted = PeftModel.from_pretrained(base_policy, tmp_path / "out" / "adapter")(ids).logits
    assert torch.allclose(merged, adapted, atol=1e-4)
    assert not torch.allclose(merged, untrained, atol=1e-2)
    assert (base / "model.safetensors").read_bytes() == before
    written_files = {path.name for path in (tmp_path / "out" / "adapter").iterdir()}
    assert written_files == {"adapter_config.json", "adapter_model.safetensors"}
    named = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert named["base_model_name_or_path"] == str(base)


def test_an_adapter_is_written_without_a_request_to_the_hub_for_its_base(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base model is often not on the hub, as the embedded model."""
    policy = TrainablePolicy(SFTTraining(**small(base)), dropout=False)
    model = get_peft_model(policy.model, policy.adapters)
    policy.settings = replace(policy.settings, base_model="smollm2-135m-instruct")
    monkeypatch.setattr(save_and_load, "check_file_exists_on_hf_hub", lambda *_: pytest.fail("a request to the hub"))
    written = write_adapter(model, policy, tmp_path)
    config = json.loads((written / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "smollm2-135m-instruct"


def test_a_model_is_written_in_the_precision_of_its_base(tmp_path: Path, base: Path) -> None:
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    data = write(tmp_path / "data.jsonl", [{"prompt": "The film", "completion": " was great"}] * 4)
    options = RunOptions(merge=True, progress=False)
    written = train_sft(data, tmp_path / "out", SFTTraining(**small(base)), options, holdout=0)
    assert AutoModelForCausalLM.from_pretrained(written).dtype == torch.bfloat16


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_a_policy_is_trained_in_bfloat16_with_an_adapter_in_float32(tmp_path: Path, base: Path, method: str) -> None:
    """As with `auto` on processors with bfloat16 instructions."""
    row = {"prompt": "The film", "completion": " was great", "chosen": " was great", "rejected": " was dull"}
    data = write(tmp_path / "data.jsonl", [row] * 4)
    recipe = small(base, dtype="bfloat16", epochs=4)
    if method == "sft":
        adapter = train_sft(data, tmp_path / "out", SFTTraining(**recipe), QUIET, holdout=0)
    else:
        adapter = train_dpo(data, tmp_path / "out", DPOTraining(**recipe), QUIET, holdout=0)
    weights = load_file(adapter / "adapter_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert any(bool(weight.any()) for name, weight in weights.items() if "lora_B" in name)


def test_the_loss_of_dpo_is_the_formula(tmp_path: Path, base: Path) -> None:
    """-log sigma(beta * difference of the log-ratios), computed by hand with and without the adapter."""
    pair = {"prompt": CHAT, "chosen": assistant("The film was great."), "rejected": assistant("dull")}
    data = write(tmp_path / "data.jsonl", [pair] * 4)
    settings = DPOTraining(**small(base, epochs=4, beta=0.3, learning_rate=1e-3))
    written = train_dpo(data, tmp_path / "out", settings, QUIET, validation_data=data)
    tokenizer, reference = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    (row, *_) = tokenise(read_rows(data), tokenizer, 128, data)
    before = [sum(log_prob(reference, row.prompt_ids, ids)) for ids in row.completions]
    policy = PeftModel.from_pretrained(reference, written).eval()
    after = [sum(log_prob(policy, row.prompt_ids, ids)) for ids in row.completions]
    margin = 0.3 * ((after[0] - before[0]) - (after[1] - before[1]))
    assert margin > 0.01
    expected = float(-torch.nn.functional.logsigmoid(torch.tensor(margin)))
    assert logged(tmp_path / "out", "validation_loss")[-1] == pytest.approx(expected, abs=1e-4)
    assert logged(tmp_path / "out", "validation_reward_accuracy")[-1] == 1.0


def test_dropout_is_off_for_dpo(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.5}))
    rates: list[float] = []
    compute_loss = TokenisedDPOTrainer.compute_loss

    def compute(trainer: Any, model: Any, *arguments: Any, **more: Any) -> Any:
        rates.extend(module.p for module in model.modules() if isinstance(module, torch.nn.Dropout))
        rates.extend(layer.self_attn.attention_dropout for layer in model.base_model.model.model.layers)
        return compute_loss(trainer, model, *arguments, **more)

    monkeypatch.setattr(TokenisedDPOTrainer, "compute_loss", compute)
    data = write(tmp_path / "data.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 4)
    train_dpo(data, tmp_path / "out", DPOTraining(**small(base)), QUIET, holdout=0)
    assert rates
    assert set(rates) == {0.0}


def test_ratings_are_refused_as_preferences_of_dpo(tmp_path: Path, base: Path) -> None:
    data = write(tmp_path / "data.jsonl", [{"text": "a film", "rating": 1.0}])
    with pytest.raises(DataError, match=r"data\.jsonl:1: a rated text is no pair"):
        train_dpo(data, tmp_path / "out", DPOTraining(**small(base)), QUIET)


class PowerCutError(Exception):
    """Stands for anything that kills a run."""


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_an_interrupted_run_ends_as_an_uninterrupted_run(
    method: str, tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [{"prompt": "The film", "completion": f" was {word}"} for word in map(str, range(22))]
    pairs = [{"prompt": "The film", "chosen": f" was {n}", "rejected": f" was {n + 1}"} for n in range(22)]
    data = write(tmp_path / "data.jsonl", lines if method == "sft" else pairs)
    trainer: Any = SFTTrainer if method == "sft" else TokenisedDPOTrainer
    options = RunOptions(checkpoint_every=10, progress=False)
    fields = small(base, epochs=2, batch_size=2)

    def train(out: Path, options: RunOptions) -> Path:
        if method == "sft":
            return train_sft(data, out, SFTTraining(**fields), options, holdout=0)
        return train_dpo(data, out, DPOTraining(**fields), options, holdout=0)

    uninterrupted = train(tmp_path / "uninterrupted", options)
    compute_loss = trainer.compute_loss

    def compute(running: Any, *arguments: Any, **more: Any) -> Any:
        if running.state.global_step == 15:  # 11 steps per epoch: in the second epoch, after the checkpoint of step 10
            raise PowerCutError
        return compute_loss(running, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "compute_loss", compute)
        with pytest.raises(PowerCutError):
            train(tmp_path / "cut", options)
    with pytest.raises(CheckpointError, match="--resume"):
        train(tmp_path / "cut", options)
    resumed = train(tmp_path / "cut", RunOptions(checkpoint_every=10, resume=True, progress=False))
    weights = "adapter_model.safetensors"
    assert (resumed / weights).read_bytes() == (uninterrupted / weights).read_bytes()
    assert logged(tmp_path / "cut", "loss") == logged(tmp_path / "uninterrupted", "loss")


def test_a_run_that_diverges_writes_no_weights(tmp_path: Path, base: Path) -> None:
    data = write(tmp_path / "data.jsonl", [{"prompt": "a", "completion": "b"}] * 16)
    with pytest.raises(TrainingError, match="training diverged"):
        train_sft(data, tmp_path / "out", SFTTraining(**small(base, learning_rate=1e30)), QUIET, holdout=0)
    assert not (tmp_path / "out" / "adapter").exists()


def test_micro_batches_that_do_not_fit_the_batch_are_refused(tmp_path: Path, base: Path) -> None:
    data = write(tmp_path / "data.jsonl", [{"prompt": "a", "completion": "b"}])
    settings = SFTTraining(**small(base, micro_batch_size=3))
    with pytest.raises(TrainingError, match="a batch of 4 does not divide into micro batches of 3"):
        train_sft(data, tmp_path / "out", settings, QUIET, holdout=0)


@pytest.mark.parametrize(
    ("method", "line"),
    [
        ("sft", {"prompt": CHAT, "completion": assistant("great")}),
        ("dpo", {"prompt": CHAT, "chosen": assistant("great"), "rejected": assistant("dull")}),
    ],
)
def test_the_command_prints_how_to_serve_the_weights(method: str, line: Any, tmp_path: Path, base: Path) -> None:
    data = write(tmp_path / "data.jsonl", [line] * 4)
    options = ["--data", str(data), "--model", str(base), "--dtype", "float32", "--holdout", "0"]
    result = CliRunner().invoke(train_app, [method, *options, "--out", str(tmp_path / "a")])
    assert result.exit_code == 0, result.output
    assert f"nbest serve --model {base} --adapter {tmp_path / 'a' / 'adapter'}" in result.output
    result = CliRunner().invoke(train_app, [method, *options, "--merge", "--out", str(tmp_path / "m")])
    assert result.exit_code == 0, result.output
    assert f"nbest serve --model {tmp_path / 'm' / 'model'}" in result.output
