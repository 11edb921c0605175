"""A reward adapter over a trunk in memory, for every way in which decoders keep their layers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from reranker.candidate import Prompt
from reranker.models.reward_model import RewardModel
from reranker.models.shared_trunk import SharedTrunk, alias, decoder_layers
from tests.support.tiny_models import Architecture, save_tiny_policy, save_tiny_reward_adapter

ARCHITECTURES: tuple[Architecture, ...] = ("llama", "gpt2", "opt", "qwen3_moe")
TEXTS = (" great and the cast", " dull, far too long", " a delight")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rewards_over_the_shared_trunk_are_those_of_a_trunk_of_its_own(
    architecture: Architecture, tmp_path: Path
) -> None:
    base = save_tiny_policy(tmp_path / "base", architecture=architecture, num_layers=3)
    adapter = save_tiny_reward_adapter(tmp_path / "adapter", base, num_layers=2)
    policy = AutoModelForCausalLM.from_pretrained(base)
    shared_trunk = SharedTrunk(str(base), alias(policy.base_model))

    def rewards(**options: Any) -> list[float]:
        model = RewardModel.load(str(adapter), device="cpu", dtype="float32", **options)
        return model.score([model.render(Prompt(text="The film was"), text) for text in TEXTS])

    own = rewards()
    assert max(own) - min(own) > 0.02
    assert rewards(shared_trunk=shared_trunk) == pytest.approx(own, abs=1e-4)
    assert len(decoder_layers(policy.base_model)) == 3, "the policy keeps its layers"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_layers_of_a_decoder_are_its_blocks(architecture: Architecture, tmp_path: Path) -> None:
    policy = AutoModelForCausalLM.from_pretrained(save_tiny_policy(tmp_path, architecture=architecture, num_layers=3))
    blocks = decoder_layers(policy.base_model)
    assert len(blocks) == 3
    assert all(isinstance(block, torch.nn.Module) and list(block.children()) for block in blocks)
