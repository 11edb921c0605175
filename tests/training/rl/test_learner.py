"""The learner computes what transformers computes, starts as its reference, and learns alike from all micro batches."""

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.tiny_models import save_tiny_policy
from training.rl.config import PPOTraining, ReinforceTraining, RLTraining
from training.rl.learner import Learner
from training.rl.memory_report import num_bytes
from training.rl.trajectories import Completion, PaddedBatch
from training.rl.update import update

CPU = torch.device("cpu")
PROMPTS = ("The film was", "What is the capital of France?", "The")
ANSWERS = (" great and the cast", " Paris.", " dull, far too long, and the ending")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_policy(tmp_path_factory.mktemp("base"))


def fields(base: Path, **more: Any) -> dict[str, Any]:
    common = {"base_model": str(base), "dtype": "float32", "learning_rate": 1e-2, "warmup_fraction": 0.0, "steps": 4}
    return common | {"batch_size": 3, "samples_per_prompt": 1} | more


def learner_of(settings: RLTraining) -> Learner:
    return Learner(settings, CPU, optimiser_steps=100)


def sampled(base: Path, temperature: float = 1.0) -> list[Completion]:
    """Three completions of different lengths, with their log-probabilities by transformers without padding."""
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    completions = []
    for index, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        prompt_ids = tokenizer(prompt)["input_ids"]
        token_ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            logits = model(torch.tensor([prompt_ids + token_ids])).logits[0, len(prompt_ids) - 1 : -1] / temperature
        logprobs = logits.log_softmax(-1).gather(-1, torch.tensor(token_ids)[:, None])[:, 0].tolist()
        score = float(index)
        completions.append(Completion(prompt_ids, token_ids, logprobs, answer, score, score, 0, is_cut=False))
    return completions


def test_prompts_are_padded_on_the_left_and_completions_on_the_right() -> None:
    short = Completion([5, 6], [7], [-1.0], "", 0, 0, 0, is_cut=False)
    long = Completion([8], [9, 4], [-1.0, -1.0], "", 0, 0, 0, is_cut=False)
    batch = PaddedBatch.of([short, long], CPU)
    assert batch.input_ids_N_L.tolist() == [[5, 6, 7, 0], [0, 8, 9, 4]]
    assert batch.attention_mask_N_L.tolist() == [[1, 1, 1, 0], [0, 1, 1, 1]]
    assert batch.mask_N_T.tolist() == [[1.0, 0.0], [1.0, 1.0]]


@pytest.mark.parametrize("micro_batch_size", [None, 1, 2])
def test_policy_and_reference_give_padded_completions_the_log_probabilities_of_unpadded_ones(
    base: Path, micro_batch_size: int | None
) -> None:
    """At temperature .7, which divides the logits of both."""
    completions = sampled(base, temperature=0.7)
    settings = PPOTraining(**fields(base, temperature=0.7, micro_batch_size=micro_batch_size))
    measures = learner_of(settings).measure(completions)
    for row, completion in enumerate(completions):
        length = len(completion.token_ids)
        for logprobs_N_T in (measures.logprobs_N_T, measures.ref_logprobs_N_T):
            assert logprobs_N_T[row, :length].tolist() == pytest.approx(completion.drawn_logprobs, abs=1e-5)
            assert logprobs_N_T[row, length:].eq(0).all() or micro_batch_size != 1


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_the_reference_is_unchanged_by_an_update_of_the_policy(full: bool, base: Path) -> None:
    settings = ReinforceTraining(**fields(base, full=full, baseline="batch"))
    learner = learner_of(settings)
    before = learner.measure(sampled(base))
    update(learner, sampled(base), 0.1, settings, random.Random(0))
    after = learner.measure(sampled(base))
    assert torch.equal(before.ref_logprobs_N_T, after.ref_logprobs_N_T)
    assert not torch.allclose(before.logprobs_N_T, after.logprobs_N_T, atol=1e-3)


@pytest.mark.parametrize("micro_batch_size", [None, 1])
def test_the_ratio_is_1_and_nothing_is_clipped_in_the_first_minibatch(base: Path, micro_batch_size: int | None) -> None:
    settings = PPOTraining(**fields(base, epochs=1, minibatches=1, micro_batch_size=micro_batch_size))
    metrics = update(learner_of(settings), sampled(base), 0.1, settings, random.Random(0))
    assert metrics["first_ratio_error"] == pytest.approx(0.0, abs=1e-5)
    assert metrics["ratio"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["clip_fraction"] == 0.0
    assert metrics["mismatch"] == pytest.approx(0.0, abs=1e-5)


def test_ratios_are_clipped_in_later_minibatches(base: Path) -> None:
    settings = PPOTraining(**fields(base, epochs=4, minibatches=3))
    metrics = update(learner_of(settings), sampled(base), 0.1, settings, random.Random(0))
    assert metrics["first_ratio_error"] == pytest.approx(0.0, abs=1e-5)
    assert metrics["clip_fraction"] > 0


@pytest.mark.parametrize("kind", [PPOTraining, ReinforceTraining])
def test_micro_batches_give_the_gradient_of_the_whole_batch(base: Path, kind: Any) -> None:
    """The mean is over all tokens of the batch; a mean of means would weigh completions of 2 to 9 tokens unequally."""
    single_step = {"epochs": 1, "minibatches": 1} if kind is PPOTraining else {"baseline": "batch"}
    results = []
    for micro_batch_size in (None, 1):
        settings = kind(**fields(base, micro_batch_size=micro_batch_size, **single_step))
        learner = learner_of(settings)
        norm = update(learner, sampled(base), 0.1, settings, random.Random(0))["gradient_norm"]
        results.append((norm, learner.measure(sampled(base)).logprobs_N_T[0, :2].tolist()))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-3)
    assert results[0][1] == pytest.approx(results[1][1], abs=1e-2)


def test_the_engines_log_probabilities_change_only_the_importance_weights(base: Path) -> None:
    """A token that was half as likely in the engine has the weight 2, which is also the largest weight."""
    settings = ReinforceTraining(**fields(base, baseline="batch", largest_importance=2.0))
    completions = sampled(base)
    assert update(learner_of(settings), completions, 0.1, settings, random.Random(0))["importance"] == pytest.approx(1)
    unlikely = [
        Completion(
            completion.prompt_ids,
            completion.token_ids,
            [logprob - 5 for logprob in completion.drawn_logprobs],
            completion.text,
            completion.score,
            completion.score,
            0,
            is_cut=False,
        )
        for completion in completions
    ]
    metrics = update(learner_of(settings), unlikely, 0.1, settings, random.Random(0))
    assert metrics["importance"] == pytest.approx(2.0)
    assert metrics["mismatch"] == pytest.approx(5.0, abs=1e-4)
    assert metrics["kl"] == pytest.approx(0.0, abs=1e-4)


def test_the_value_loss_has_no_gradient_in_the_policy(base: Path) -> None:
    settings = PPOTraining(**fields(base, epochs=1, minibatches=1, gae_lambda=1.0))
    learner = learner_of(settings)
    outputs = learner.forward(sampled(base))
    (outputs.values_N_T - 1).square().sum().backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is None for parameter in learner.model.parameters())


def test_a_restored_learner_takes_the_same_step(base: Path) -> None:
    settings = PPOTraining(**fields(base, epochs=2, minibatches=2))
    learner, other = learner_of(settings), learner_of(settings)
    update(learner, sampled(base), 0.1, settings, random.Random(0))
    other.restore(copy.deepcopy(learner.state()))
    for trained in (learner, other):
        update(trained, sampled(base), 0.1, settings, random.Random(1))
    assert torch.equal(learner.measure(sampled(base)).logprobs_N_T, other.measure(sampled(base)).logprobs_N_T)
    assert torch.equal(learner.measure(sampled(base)).values_N_T, other.measure(sampled(base)).values_N_T)


def test_with_an_adapter_the_learner_holds_one_model_and_few_trained_parameters(base: Path) -> None:
    """Rank 1 in 2 * 7 linear layers with widths 32 (hidden), 64 (inner) and 16 (two heads); a value head of 32 + 1."""
    base_size = sum(weights.numel() for weights in AutoModelForCausalLM.from_pretrained(base).parameters())
    layer_size = (32 + 32) + 2 * (32 + 16) + (32 + 32) + 3 * (32 + 64)
    learner = learner_of(PPOTraining(**fields(base, lora_rank=1)))
    parts = {name: num_bytes(tensors) // 4 for name, tensors in learner.parameters.items()}
    assert parts == {"base": base_size, "policy": 2 * layer_size, "values": 33, "reference": 0}
    full = learner_of(PPOTraining(**fields(base, full=True)))
    parts = {name: num_bytes(tensors) // 4 for name, tensors in full.parameters.items()}
    assert parts == {"base": base_size, "policy": 0, "values": 33, "reference": base_size}


def test_a_base_stored_in_bfloat16_is_held_in_bfloat16_and_rounded_once_when_merged(base: Path, tmp_path: Path) -> None:
    """Products are in bfloat16 here. Trained parameters are float32 in any case."""
    stored = tmp_path / "stored"
    AutoTokenizer.from_pretrained(base).save_pretrained(stored)
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(stored)
    settings = PPOTraining(**fields(stored, dtype="bfloat16"))
    learner = learner_of(settings)
    assert {parameter.dtype for parameter in learner.parameters["base"]} == {torch.bfloat16}
    assert {parameter.dtype for parameter in learner.trained_parameters} == {torch.float32}
    update(learner, sampled(stored), 0.1, settings, random.Random(0))
    learner.write_result(tmp_path / "out", merge=True)
    plain: Any = AutoModelForCausalLM.from_pretrained(stored, dtype=torch.float32)
    expected = PeftModel.from_pretrained(plain, tmp_path / "out" / "adapter").merge_and_unload().state_dict()
    written = load_file(tmp_path / "out" / "model" / "model.safetensors")
    for name, weights in written.items():
        assert torch.equal(weights, expected[name].bfloat16()), name
    held_in_float32 = learner_of(PPOTraining(**fields(stored)))
    assert {parameter.dtype for parameter in held_in_float32.parameters["base"]} == {torch.float32}
