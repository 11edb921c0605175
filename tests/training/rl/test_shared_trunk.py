"""Policy, reference and reward read one base, and none of them notices the others.

The policy's adapter has learnt before anything is compared, so that it would be seen wherever it leaked to.
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
    """Reads two layers of three."""
    return save_tiny_reward_adapter(tmp_path / "adapter", base, num_layers=2)


def settings(base: Path, **more: Any) -> PPOTraining:
    fields: dict[str, Any] = {"base_model": str(base), "dtype": "float32", "learning_rate": 3e-2, "steps": 4}
    fields |= {"warmup_fraction": 0.0, "batch_size": 3, "samples_per_prompt": 1, "epochs": 2, "minibatches": 3}
    return PPOTraining(**fields | more)


def completions(learner: Learner) -> list[Completion]:
    prompt_ids = learner.tokenizer(PROMPT.text)["input_ids"]
    drawn = []
    for place, text in enumerate(TEXTS):
        token_ids = learner.tokenizer(text, add_special_tokens=False)["input_ids"]
        nats, score = [-1.0] * len(token_ids), float(place)
        drawn.append(Completion(prompt_ids, token_ids, nats, text, score, score, 0, is_cut=False))
    return drawn


def learn(learner: Learner, base: Path, *, times: int = 1) -> None:
    for _ in range(times):
        update(learner, completions(learner), 0.1, settings(base), random.Random(0))


@pytest.fixture
def learner(base: Path) -> Learner:
    """One whose policy is far from its reference."""
    learner = Learner(settings(base), CPU, optimiser_steps=100)
    learn(learner, base)
    measured = learner.measure(completions(learner))
    assert (measured.logprobs_N_T - measured.ref_logprobs_N_T).abs().max() > 0.1
    return learner


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


async def scorer_of(adapter: Path, held: SharedTrunk | None, stack: AsyncExitStack) -> Scorer:
    """As a server makes it."""
    settings = load_settings({"reward_models": [f"reward={adapter}"], "device": "cpu", "reward_dtype": "float32"})
    nobody: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    return (await stack.enter_async_context(started_scorers(settings, nobody, held=held)))["reward"]


async def rewards_of(scorer: Scorer) -> list[float]:
    candidates = [Candidate(place, text, 1) for place, text in enumerate(TEXTS)]
    return list((await scorer.score(PROMPT, candidates)).rewards_N)


def own_tensors(model: RewardModel, learner: Learner) -> list[str]:
    """Names of the reward model's weights that the learner does not hold."""
    held = {weights.untyped_storage().data_ptr() for weights in learner.model.parameters()}
    named = model._model.named_parameters()
    return [name for name, weights in named if weights.untyped_storage().data_ptr() not in held]


async def test_a_reward_over_the_learners_trunk_is_the_one_that_serves(
    adapter: Path, base: Path, learner: Learner, stack: AsyncExitStack
) -> None:
    serving = await rewards_of(await scorer_of(adapter, None, stack))
    assert max(serving) - min(serving) > 0.1
    shared = await scorer_of(adapter, learner.held_trunk, stack)
    assert await rewards_of(shared) == pytest.approx(serving, abs=1e-4)
    learn(learner, base)
    assert await rewards_of(shared) == pytest.approx(serving, abs=1e-4)


async def test_the_reward_moves_neither_policy_nor_reference(
    adapter: Path, base: Path, learner: Learner, stack: AsyncExitStack
) -> None:
    """Another learner learns the same where nothing is scored."""
    alone = Learner(settings(base), CPU, optimiser_steps=100)
    learn(alone, base)
    shared = await scorer_of(adapter, learner.held_trunk, stack)
    for one in (learner, alone):
        await rewards_of(shared)
        learn(one, base)
    found, expected = learner.measure(completions(learner)), alone.measure(completions(alone))
    assert torch.equal(found.logprobs_N_T, expected.logprobs_N_T)
    assert torch.equal(found.ref_logprobs_N_T, expected.ref_logprobs_N_T)


async def test_scoring_while_the_learner_learns_gives_what_either_gives_alone(
    adapter: Path, base: Path, learner: Learner, stack: AsyncExitStack
) -> None:
    alone = Learner(settings(base), CPU, optimiser_steps=100)
    learn(alone, base)
    shared = await scorer_of(adapter, learner.held_trunk, stack)
    expected = await rewards_of(shared)
    async with asyncio.TaskGroup() as group:
        learning = group.create_task(asyncio.to_thread(learn, learner, base, times=3))
        while not learning.done():
            assert await rewards_of(shared) == pytest.approx(expected, abs=1e-5)
    learn(alone, base, times=3)
    found, kept = learner.measure(completions(learner)), alone.measure(completions(alone))
    assert found.logprobs_N_T[0] == pytest.approx(kept.logprobs_N_T[0], abs=1e-5)


def test_beside_the_trunk_a_reward_takes_its_adapter_and_head_alone(adapter: Path, learner: Learner) -> None:
    model = RewardModel.load(str(adapter), device="cpu", dtype="float32", held=learner.held_trunk)
    own = own_tensors(model, learner)
    assert own
    assert all("lora_" in name or "score" in name for name in own)
    assert model.shares_prompts
    assert not any(weights.requires_grad for weights in model._model.parameters())


@pytest.mark.parametrize("shared", [True, False])
def test_a_second_copy_of_the_base_would_be_counted(shared: bool, adapter: Path, learner: Learner) -> None:
    """Other tests leave weights of their own in this process, so what is told is what one reward model adds."""
    before = held_bytes(learner)
    model = RewardModel.load(str(adapter), device="cpu", dtype="float32", held=learner.held_trunk if shared else None)
    after = held_bytes(learner)
    own = num_bytes(weights for name, weights in model._model.named_parameters() if name in own_tensors(model, learner))
    assert after["reward"] - before["reward"] == own
    assert (own < before["base"] / 3) == shared
    assert before["optimiser"] > 2 * before["policy"]


def test_another_base_is_loaded_as_ever(tmp_path: Path, learner: Learner) -> None:
    other = save_tiny_policy(tmp_path / "other", num_layers=3, seed=5)
    adapter = save_tiny_reward_adapter(tmp_path / "of-other", other)
    held, loaded = (
        RewardModel.load(str(adapter), device="cpu", dtype="float32", held=trunk)
        for trunk in (learner.held_trunk, None)
    )
    assert len(own_tensors(held, learner)) == len(list(held._model.parameters()))
    rendered = [held.render(PROMPT, text) for text in TEXTS]
    assert held.score(rendered) == loaded.score(rendered)


def test_where_all_weights_learn_there_is_no_trunk_to_be_shared(base: Path) -> None:
    assert Learner(settings(base, full=True), CPU, optimiser_steps=1).held_trunk is None


def test_the_default_models_are_one_base_and_little_more() -> None:
    """And the reward over a policy that has moved is the one that serves."""
    learner = Learner(PPOTraining(dtype="float32"), CPU, optimiser_steps=1)
    with torch.no_grad():
        for weights in learner.learning:
            weights.add_(torch.randn_like(weights) / 10)
    shared, serving = (
        RewardModel.load("movie-sentiment", device="cpu", dtype="float32", held=held)
        for held in (learner.held_trunk, None)
    )
    texts = (" a delight, warm and superbly acted.", " dull and far too long.", " fine.")
    rendered = [shared.render(PROMPT, text) for text in texts]
    assert shared.score(rendered) == pytest.approx(serving.score(rendered), abs=1e-4)
    checkpoint = num_bytes(learner.parameters["base"])
    everything = [*learner.model.parameters(), *learner.parameters["values"], *shared._model.parameters()]
    assert checkpoint < num_bytes(everything) <= 1.15 * checkpoint
