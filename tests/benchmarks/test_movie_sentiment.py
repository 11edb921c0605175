import json
from typing import Any

from benchmarks.movie_ratings import OTHER_DOMAINS
from benchmarks.movie_sentiment import NAME, RECIPE, RESULTS
from reranker.models.bundled import PRETRAINED_REWARDS
from reranker.models.reward_model import RewardConfig
from tests.support.paths import ROOT


def measured() -> dict[str, Any]:
    return dict(json.loads((ROOT / RESULTS).read_text())["test"])


def test_the_reward_model_beats_its_baselines_by_more_than_the_intervals() -> None:
    results = measured()
    ours = results.pop(NAME)
    assert ours["low"] > 85.1
    assert all(ours["low"] > baseline["high"] for baseline in results.values())


def test_every_domain_is_evaluated_with_every_scorer_for_small_and_large_gaps() -> None:
    domains = json.loads((ROOT / RESULTS).read_text())["other_domains"]
    assert set(domains) == set(OTHER_DOMAINS)
    for domain in domains.values():
        assert set(domain["scorers"]) == set(measured())
        assert all("0 to 1" in figures["by_gap"] and figures["comparisons"] for figures in domain["scorers"].values())


def test_the_shipped_adapter_matches_the_recipe_and_is_small() -> None:
    directory = PRETRAINED_REWARDS[NAME]
    config = json.loads((directory / "adapter_config.json").read_text())
    assert RewardConfig.load(directory) == RewardConfig(RECIPE.base_model, RECIPE.style, RECIPE.num_layers)
    assert config["r"] == RECIPE.lora_rank
    assert len(config["layers_to_transform"]) == RECIPE.lora_layers
    assert (directory / "adapter_model.safetensors").stat().st_size < 6_000_000
