"""Policy, reference and reward model share one base without any influence on each other.

The policy's adapter is trained before anything is compared, so that its influence would be visible.
"""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from reranker.candidate import Candidate, Prompt
from reranker.models.reward_model import RewardModel
from reranker.models.shared_trunk import SharedTrunk
from reranker.scorers.base import Scorer
from server.config import load_settings
from server.factory import started_scorers
from tests.support.tiny_models import save_tiny_policy, save_tiny_reward_adapter
from training.rl.config import PPOTraining
from training.rl.learner import Learner
from training.rl.memory_report import held_bytes, num_bytes
from training.rl.trajectories import Completion
from training.rl.update import update

CPU = torch.device("cpu")
TEXTS = (" great and the cast", " dull, far too long", " a delight")
PROMPT = Prompt(text="The film was")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_tiny_policy(tmp_path / "base", num_layers=3)


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    """A reward adapter over two of the three layers."""
    return save_tiny_reward_adapter(tmp_path / "adapter", base, num_layers=2)


def settings(base: Path, **more: Any) -> PPOTraining:
    fields: dict[str, Any] = {"base_model": str(base), "dtype": "float32", "learning_rate": 3e-2, "steps": 4}
    fields |= {"warmup_fraction": 0.0, "batch_size": 3, "samples_per_prompt": 1, "epochs": 2, "minibatches": 3}
    return PPOTraining(**fields | more)


def completions(learner: Learner) -> list[Completion]:
    prompt_ids = learner.tokenizer(PROMPT.text)["input_ids"]
    sampled = []
    for index, text in enumerate(TEXTS):
        token_ids = learner.tokenizer(text, add_special_tokens=False)["input_ids"]
        logprobs, score = [-1.0] * len(token_ids), float(index)
        sampled.append(Completion(prompt_ids, token_ids, logprobs, text, score, score, 0, is_cut=False))
    return sampled


def learn(learner: Learner, base: Path, *, times: int = 1) -> None:
    for _ in range(times):
        update(learner, completions(learner), 0.1, settings(base), random.Random(0))


@pytest.fixture
def learner(base: Path) -> Learner:
    """A learner whose policy is far from its reference."""
    learner = Learner(settings(base), CPU, optimiser_steps=100)
    learn(learner, base)
    measures = learner.measure(completions(learner))
    assert (measures.logprobs_N_T - measures.ref_logprobs_N_T).abs().max() > 0.1
    return learner


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


async def scorer_of(adapter: Path, trunk: SharedTrunk | None, stack: AsyncExitStack) -> Scorer:
    """The scorer as the server builds it."""
    settings = load_settings({"reward_models": [f"reward={adapter}"], "device": "cpu", "reward_dtype": "float32"})
    no_policy: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    return (await stack.enter_async_context(started_scorers(settings, no_policy, shared_trunk=trunk)))["reward"]


async def rewards_of(scorer: Scorer) -> list[float]:
    candidates = [Candidate(index, text, 1) for index, text in enumerate(TEXTS)]
    return list((await scorer.score(PROMPT, candidates)).rewards_N)


def own_tensors(model: RewardModel, learner: Learner) -> list[str]:
    """Names of the reward model's weights that the learner does not hold."""
    held = {weights.untyped_storage().data_ptr() for weights in learner.model.parameters()}
    named = model._model.named_parameters()
    return [name for name, weights in named if weights.untyped_storage().data_ptr() not in held]


async def test_rewards_over_the_learners_trunk_equal_those_in_serving(
    adapter: Path, base: Path, learner: Learner, stack: AsyncExitStack
) -> None:
    serving = await rewards_of(await scorer_of(adapter, None, stack))
    assert max(serving) - min(serving) > 0.1
    shared = await scorer_of(adapter, learner.shared_trunk, stack)
    assert await rewards_of(shared) == pytest.approx(serving, abs=1e-4)
    learn(learner, base)
    assert await rewards_of(shared) == pytest.approx(serving, abs=1e-4)


async def test_scoring_changes_neither_policy_nor_reference(
    adapter: Path, base: Path, learner: Learner, stack: AsyncExitStack
) -> None:
    """A learner without scoring learns the same."""
    alone = Learner(settings(base), CPU, optimiser_steps=100)
    learn(alone, base)
    shared = await scorer_of(adapter, learner.shared_trunk, stack)
    for trained in (learner, alone):
        await rewards_of(shared)
        learn(trained, base)
    measures, expected = learner.measure(completions(learner)), alone.measure(completions(alone))
    assert torch.equal(measures.logprobs_N_T, expected.logprobs_N_T)
    assert torch.equal(measures.ref_logprobs_N_T, expected.ref_logprobs_N_T)


async def test_scoring_during_learning_changes_neither_rewards_nor_weights(
    adapter: Path, base: Path, learner: Learner, stack: AsyncExitStack
) -> None:
    alone = Learner(settings(base), CPU, optimiser_steps=100)
    learn(alone, base)
    shared = await scorer_of(adapter, learner.shared_trunk, stack)
    expected = await rewards_of(shared)
    async with asyncio.TaskGroup() as group:
        learning = group.create_task(asyncio.to_thread(learn, learner, base, times=3))
        while not learning.done():
            assert await rewards_of(shared) == pytest.approx(expected, abs=1e-5)
    learn(alone, base, times=3)
    measures, reference = learner.measure(completions(learner)), alone.measure(completions(alone))
    assert measures.logprobs_N_T[0] == pytest.approx(reference.logprobs_N_T[0], abs=1e-5)


def test_a_reward_model_over_the_shared_trunk_owns_only_its_adapter_and_head(adapter: Path, learner: Learner) -> None:
    model = RewardModel.load(str(adapter), device="cpu", dtype="float32", shared_trunk=learner.shared_trunk)
    own = own_tensors(model, learner)
    assert own
    assert all("lora_" in name or "score" in name for name in own)
    assert model.shares_prompts
    assert not any(weights.requires_grad for weights in model._model.parameters())


@pytest.mark.parametrize("shared", [True, False])
def test_the_memory_report_counts_a_second_copy_of_the_base(shared: bool, adapter: Path, learner: Learner) -> None:
    """Other tests leave weights in this process, so the test compares the report before and after loading the model."""
    before = held_bytes(learner)
    trunk = learner.shared_trunk if shared else None
    model = RewardModel.load(str(adapter), device="cpu", dtype="float32", shared_trunk=trunk)
    after = held_bytes(learner)
    own = num_bytes(weights for name, weights in model._model.named_parameters() if name in own_tensors(model, learner))
    assert after["reward"] - before["reward"] == own
    assert (own < before["base"] / 3) == shared
    assert before["optimiser"] > 2 * before["policy"]


def test_a_reward_model_over_another_base_loads_its_own_base(tmp_path: Path, learner: Learner) -> None:
    other = save_tiny_policy(tmp_path / "other", num_layers=3, seed=5)
    adapter = save_tiny_reward_adapter(tmp_path / "of-other", other)
    with_trunk, without_trunk = (
        RewardModel.load(str(adapter), device="cpu", dtype="float32", shared_trunk=trunk)
        for trunk in (learner.shared_trunk, None)
    )
    assert len(own_tensors(with_trunk, learner)) == len(list(with_trunk._model.parameters()))
    rendered = [with_trunk.render(PROMPT, text) for text in TEXTS]
    assert with_trunk.score(rendered) == without_trunk.score(rendered)


def test_with_full_training_there_is_no_shared_trunk(base: Path) -> None:
    assert Learner(settings(base, full=True), CPU, optimiser_steps=1).shared_trunk is None


def test_the_default_models_take_one_base_and_few_more_parameters() -> None:
    """The rewards over a changed policy also equal those in serving."""
    learner = Learner(PPOTraining(dtype="float32"), CPU, optimiser_steps=1)
    with torch.no_grad():
        for weights in learner.trained_parameters:
            weights.add_(torch.randn_like(weights) / 10)
    shared, serving = (
        RewardModel.load("movie-sentiment", device="cpu", dtype="float32", shared_trunk=trunk)
        for trunk in (learner.shared_trunk, None)
    )
    texts = (" a delight, warm and superbly acted.", " dull and far too long.", " fine.")
    rendered = [shared.render(PROMPT, text) for text in texts]
    assert shared.score(rendered) == pytest.approx(serving.score(rendered), abs=1e-4)
    checkpoint = num_bytes(learner.parameters["base"])
    everything = [*learner.model.parameters(), *learner.parameters["values"], *shared._model.parameters()]
    assert checkpoint < num_bytes(everything) <= 1.15 * checkpoint
