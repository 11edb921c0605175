"""The learner reads what transformers reads, begins as its reference, and learns the same however a batch is cut."""

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
from training.rl.trajectories import Completion, Rows
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


def drawn(base: Path, temperature: float = 1.0) -> list[Completion]:
    """Three completions of different lengths, with the log-probabilities that transformers gives each token alone."""
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    found = []
    for place, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        prompt_ids = tokenizer(prompt)["input_ids"]
        token_ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            logits = model(torch.tensor([prompt_ids + token_ids])).logits[0, len(prompt_ids) - 1 : -1] / temperature
        logprobs = logits.log_softmax(-1).gather(-1, torch.tensor(token_ids)[:, None])[:, 0].tolist()
        score = float(place)
        found.append(Completion(prompt_ids, token_ids, logprobs, answer, score, score, 0, is_cut=False))
    return found


def test_prompts_are_padded_on_the_left_and_completions_on_the_right() -> None:
    one = Completion([5, 6], [7], [-1.0], "", 0, 0, 0, is_cut=False)
    other = Completion([8], [9, 4], [-1.0, -1.0], "", 0, 0, 0, is_cut=False)
    rows = Rows.of([one, other], CPU)
    assert rows.input_ids_N_L.tolist() == [[5, 6, 7, 0], [0, 8, 9, 4]]
    assert rows.attention_mask_N_L.tolist() == [[1, 1, 1, 0], [0, 1, 1, 1]]
    assert rows.mask_N_T.tolist() == [[1.0, 0.0], [1.0, 1.0]]


@pytest.mark.parametrize("micro_batch_size", [None, 1, 2])
def test_in_padded_rows_policy_and_reference_say_what_transformers_says_of_each_completion_alone(
    base: Path, micro_batch_size: int | None
) -> None:
    """At temperature .7, which divides the logits of both."""
    completions = drawn(base, temperature=0.7)
    settings = PPOTraining(**fields(base, temperature=0.7, micro_batch_size=micro_batch_size))
    measured = learner_of(settings).measure(completions)
    for row, one in enumerate(completions):
        length = len(one.token_ids)
        for logprobs_N_T in (measured.logprobs_N_T, measured.ref_logprobs_N_T):
            assert logprobs_N_T[row, :length].tolist() == pytest.approx(one.drawn_logprobs, abs=1e-5)
            assert logprobs_N_T[row, length:].eq(0).all() or micro_batch_size != 1


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_the_reference_stays_when_the_policy_moves(full: bool, base: Path) -> None:
    learner = learner_of(ReinforceTraining(**fields(base, full=full, baseline="batch")))
    before = learner.measure(drawn(base))
    update(learner, drawn(base), 0.1, ReinforceTraining(**fields(base, full=full, baseline="batch")), random.Random(0))
    after = learner.measure(drawn(base))
    assert torch.equal(before.ref_logprobs_N_T, after.ref_logprobs_N_T)
    assert not torch.allclose(before.logprobs_N_T, after.logprobs_N_T, atol=1e-3)


@pytest.mark.parametrize("micro_batch_size", [None, 1])
def test_in_the_first_minibatch_the_ratio_is_1_and_nothing_is_clipped(base: Path, micro_batch_size: int | None) -> None:
    settings = PPOTraining(**fields(base, epochs=1, minibatches=1, micro_batch_size=micro_batch_size))
    learnt = update(learner_of(settings), drawn(base), 0.1, settings, random.Random(0))
    assert learnt["first_ratio_error"] == pytest.approx(0.0, abs=1e-5)
    assert learnt["ratio"] == pytest.approx(1.0, abs=1e-5)
    assert learnt["clip_fraction"] == 0.0
    assert learnt["mismatch"] == pytest.approx(0.0, abs=1e-5)


def test_later_minibatches_are_off_the_policy_that_drew(base: Path) -> None:
    settings = PPOTraining(**fields(base, epochs=4, minibatches=3))
    learnt = update(learner_of(settings), drawn(base), 0.1, settings, random.Random(0))
    assert learnt["first_ratio_error"] == pytest.approx(0.0, abs=1e-5)
    assert learnt["clip_fraction"] > 0


@pytest.mark.parametrize("kind", [PPOTraining, ReinforceTraining])
def test_a_batch_computed_in_parts_teaches_what_it_teaches_at_once(base: Path, kind: Any) -> None:
    """By the tokens of the whole batch: completions of 2 to 9 tokens would weigh differently in a mean of means."""
    alike = {"epochs": 1, "minibatches": 1} if kind is PPOTraining else {"baseline": "batch"}
    read = []
    for micro_batch_size in (None, 1):
        settings = kind(**fields(base, micro_batch_size=micro_batch_size, **alike))
        learner = learner_of(settings)
        norm = update(learner, drawn(base), 0.1, settings, random.Random(0))["gradient_norm"]
        read.append((norm, learner.measure(drawn(base)).logprobs_N_T[0, :2].tolist()))
    assert read[0][0] == pytest.approx(read[1][0], rel=1e-3)
    assert read[0][1] == pytest.approx(read[1][1], abs=1e-2)


def test_what_the_engine_drew_with_weighs_the_loss_and_nothing_else(base: Path) -> None:
    """A token that the engine thought half as likely counts twice, and no more than that."""
    settings = ReinforceTraining(**fields(base, baseline="batch", largest_importance=2.0))
    completions = drawn(base)
    assert update(learner_of(settings), completions, 0.1, settings, random.Random(0))["importance"] == pytest.approx(1)
    unlikely = [
        Completion(
            one.prompt_ids,
            one.token_ids,
            [p - 5 for p in one.drawn_logprobs],
            one.text,
            one.score,
            one.score,
            0,
            is_cut=False,
        )
        for one in completions
    ]
    learnt = update(learner_of(settings), unlikely, 0.1, settings, random.Random(0))
    assert learnt["importance"] == pytest.approx(2.0)
    assert learnt["mismatch"] == pytest.approx(5.0, abs=1e-4)
    assert learnt["kl"] == pytest.approx(0.0, abs=1e-4)


def test_the_values_do_not_move_the_policy(base: Path) -> None:
    """All rewards alike and no price of KL: nothing to learn for the policy, whatever the value head has to."""
    settings = PPOTraining(**fields(base, epochs=1, minibatches=1, gae_lambda=1.0))
    learner = learner_of(settings)
    reading = learner.read(drawn(base))
    (reading.values_N_T - 1).square().sum().backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is None for parameter in learner.model.parameters())


def test_restored_a_learner_takes_the_same_step(base: Path) -> None:
    settings = PPOTraining(**fields(base, epochs=2, minibatches=2))
    learner, other = learner_of(settings), learner_of(settings)
    update(learner, drawn(base), 0.1, settings, random.Random(0))
    other.restore(copy.deepcopy(learner.state()))
    for one in (learner, other):
        update(one, drawn(base), 0.1, settings, random.Random(1))
    assert torch.equal(learner.measure(drawn(base)).logprobs_N_T, other.measure(drawn(base)).logprobs_N_T)
    assert torch.equal(learner.measure(drawn(base)).values_N_T, other.measure(drawn(base)).values_N_T)


def test_with_an_adapter_the_learner_holds_one_model_and_the_little_that_learns(base: Path) -> None:
    """Rank 1 in the 2 * 7 linear layers of 32 states, 64 inner ones and 16 of two heads; and a head of 32 + 1."""
    of_base = sum(weights.numel() for weights in AutoModelForCausalLM.from_pretrained(base).parameters())
    of_layer = (32 + 32) + 2 * (32 + 16) + (32 + 32) + 3 * (32 + 64)
    learner = learner_of(PPOTraining(**fields(base, lora_rank=1)))
    parts = {name: num_bytes(tensors) // 4 for name, tensors in learner.parameters.items()}
    assert parts == {"base": of_base, "policy": 2 * of_layer, "values": 33, "reference": 0}
    full = learner_of(PPOTraining(**fields(base, full=True)))
    parts = {name: num_bytes(tensors) // 4 for name, tensors in full.parameters.items()}
    assert parts == {"base": of_base, "policy": 0, "values": 33, "reference": of_base}


def test_a_base_stored_in_bfloat16_is_held_in_it_and_rounded_once_when_it_is_merged(base: Path, tmp_path: Path) -> None:
    """Where products are taken in bfloat16. What learns is float32 all the same."""
    stored = tmp_path / "stored"
    AutoTokenizer.from_pretrained(base).save_pretrained(stored)
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(stored)
    settings = PPOTraining(**fields(stored, dtype="bfloat16"))
    learner = learner_of(settings)
    assert {one.dtype for one in learner.parameters["base"]} == {torch.bfloat16}
    assert {one.dtype for one in learner.learning} == {torch.float32}
    update(learner, drawn(stored), 0.1, settings, random.Random(0))
    learner.write_result(tmp_path / "out", merge=True)
    plain: Any = AutoModelForCausalLM.from_pretrained(stored, dtype=torch.float32)
    expected = PeftModel.from_pretrained(plain, tmp_path / "out" / "adapter").merge_and_unload().state_dict()
    written = load_file(tmp_path / "out" / "model" / "model.safetensors")
    for name, weights in written.items():
        assert torch.equal(weights, expected[name].bfloat16()), name
    held_in_float32 = learner_of(PPOTraining(**fields(stored)))
    assert {one.dtype for one in held_in_float32.parameters["base"]} == {torch.float32}
