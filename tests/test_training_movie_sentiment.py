import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from reranker.prepared import PRETRAINED_REWARDS
from reranker.reward_model import RewardConfig
from training.movie_sentiment import NAME, RECIPE, RESULTS

ROOT = Path(__file__).parent.parent
CARD = (PRETRAINED_REWARDS[NAME] / "README.md").read_text()


def measured() -> dict[str, Any]:
    return dict(json.loads((ROOT / RESULTS).read_text())["test"])


def test_the_reward_beats_its_baselines_by_more_than_the_intervals() -> None:
    results = measured()
    ours = results.pop(NAME)
    assert ours["low"] > 85.1
    assert all(ours["low"] > baseline["high"] for baseline in results.values())


def test_the_model_card_tells_the_figures_that_were_measured() -> None:
    for name, result in measured().items():
        line = next(line for line in CARD.splitlines() if line.startswith(f"| {name} "))
        assert f"{result['accuracy']:.1f}% ({result['low']:.1f} to {result['high']:.1f})" in line
        assert all(f"{gap['accuracy']:.1f}%" in line for gap in result["by_gap"].values())


def test_the_adapter_is_the_one_the_recipe_makes_and_small() -> None:
    directory = PRETRAINED_REWARDS[NAME]
    config = json.loads((directory / "adapter_config.json").read_text())
    told = replace(RewardConfig.load(directory), reward_mean=None, reward_std=None)
    assert told == RewardConfig(RECIPE.base_model, RECIPE.style, RECIPE.num_layers)
    assert config["r"] == RECIPE.lora_rank
    assert len(config["layers_to_transform"]) == RECIPE.lora_layers
    assert (directory / "adapter_model.safetensors").stat().st_size < 6_000_000
